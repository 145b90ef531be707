"""Keys of the draws."""

import torch

from entrgi_kernels.guidance.config import GuidanceConfig
from entrgi_kernels.guidance.keys import REVISION, draw_counter, prompt_keys, revision, row_keys


def test_a_revision_is_of_the_settings_whose_texts_it_changed():
    for search in ("smc", "svdd"):
        assert revision(GuidanceConfig(search=search)) == REVISION
    assert revision(GuidanceConfig(alg="origin", schedule="even")) == REVISION
    assert revision(GuidanceConfig(suppress_undrawable=False, schedule="even")) == REVISION
    assert {revision(GuidanceConfig(alg=alg)) for alg in ("entropy", "origin")} == {1}
    assert revision(GuidanceConfig(schedule="even")) == 1


def test_a_prompts_key_depends_on_its_tokens_and_its_repetition_alone():
    alone = prompt_keys([[1, 2, 3]])
    among = prompt_keys([[9], [1, 2, 3], [1, 2], [1, 2, 3]])
    assert among[1] == alone[0] and len(set(among)) == 4
    assert prompt_keys([[1, 23]]) != prompt_keys([[12, 3]])


def test_a_seed_of_its_own_takes_the_place_of_the_repetition():
    keys = prompt_keys([[1, 2], [1, 2], [1, 2], [3]], seeds=[5, 6, 5, 5])
    assert keys[0] == keys[2] and len(set(keys)) == 3
    assert prompt_keys([[1, 2]], seeds=[6]) == keys[1:2] != prompt_keys([[1, 2]])


def test_row_keys_are_distinct_positive_and_independent_of_the_batch():
    prompts = prompt_keys([[i] for i in range(5)])
    keys = row_keys(prompts, 3, 7, torch.device("cpu"))
    assert keys.shape == (15, 7) and keys.unique().numel() == 105 and bool((keys >= 0).all())
    assert torch.equal(row_keys(prompts[2:3], 3, 7, torch.device("cpu")), keys[6:9])


def test_step_keys_are_distinct():
    assert len({draw_counter(t, m) for t in range(20) for m in (0, 1, 2, 254, 255)}) == 100
    assert draw_counter(16777215, 255) < 1 << 32
