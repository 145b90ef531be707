"""Prompts from small local datasets with the published ones' columns, from files, and how they are split."""

from __future__ import annotations

import json

import pytest

from entrgi.errors import UsageError
from entrgi.train import data

datasets = pytest.importorskip("datasets")


def _save(rows: list[dict], path) -> str:
    datasets.Dataset.from_list(rows).save_to_disk(str(path))
    return str(path)


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def test_wildchat_takes_the_last_user_turn_once(tmp_path):
    chosen = [turn("user", "first"), turn("assistant", "yes"), turn("user", " second "), turn("assistant", "no")]
    rows = [
        {"id": "a", "prompt": "  What is rain? ", "chosen": chosen, "rejected": chosen},
        {"id": "b", "prompt": "What is rain?", "chosen": chosen, "rejected": chosen},
        {"id": "c", "prompt": "", "chosen": chosen, "rejected": chosen},
        {"id": "d", "prompt": "", "chosen": [turn("assistant", "hm")], "rejected": []},
    ]
    found = data.load_prompts(f"wildchat={_save(rows, tmp_path / 'set')}")
    assert sorted(found) == ["What is rain?", "second"]
    assert data.last_user_turn({"prompt": chosen}) == "second"


def test_magpie_takes_good_and_excellent_instructions(tmp_path):
    grades = ["very poor", "poor", "average", "good", "excellent", None]
    rows = [{"instruction": f"Task {grade}", "response": "…", "quality": grade} for grade in grades]
    found = data.load_prompts(f"magpie={_save(rows, tmp_path / 'set')}")
    assert sorted(found) == ["Task excellent", "Task good"]


def test_lmsys_takes_the_first_turn_of_english_conversations(tmp_path):
    rows = [
        {"language": "English", "conversation": [turn("user", "Hello"), turn("assistant", "Hi"), turn("user", "Bye")]},
        {"language": "German", "conversation": [turn("user", "Hallo"), turn("assistant", "Hallo")]},
        {"language": "English", "conversation": [turn("assistant", "I begin"), turn("user", "Odd")]},
    ]
    assert data.load_prompts(f"lmsys={_save(rows, tmp_path / 'set')}") == ["Hello"]


def test_presets_name_the_published_sets_and_figures():
    assert {name: preset.path for name, preset in data.PRESETS.items()} == {
        "wildchat": "allenai/tulu-3-wildchat-if-on-policy-8b",
        "magpie": "argilla/magpie-ultra-v0.1",
        "lmsys": "lmsys/lmsys-chat-1m",
    }
    assert (data.SEED, data.COUNT) == (42, 20_000)


def test_the_first_rows_of_the_shuffled_set_then_no_prompt_twice(tmp_path):
    rows = [{"instruction": f"Task {i % 40}", "quality": "good"} for i in range(100)]
    path = _save(rows, tmp_path / "set")
    found = data.load_prompts(f"magpie={path}", count=50)
    shuffled = datasets.load_from_disk(path).shuffle(seed=42).select(range(50))["instruction"]
    assert found == list(dict.fromkeys(shuffled)) and len(found) < 50
    assert found != data.load_prompts(f"magpie={path}", count=50, seed=1)


def test_any_dataset_by_column(tmp_path):
    talk = [turn("system", "Be brief."), turn("user", "Hi"), turn("assistant", "Hello")]
    path = _save([{"text": "One", "messages": talk}, {"text": "Two", "messages": talk}], tmp_path / "set")
    assert sorted(data.load_prompts(path, field="text")) == ["One", "Two"]
    assert data.load_prompts(path, field="messages") == [talk[:2]]
    with pytest.raises(UsageError, match=r"no column 'prompt': its columns are \['messages', 'text'\]"):
        data.load_prompts(path)


def test_a_folder_of_files_is_a_dataset(tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "train.jsonl").write_text("".join(json.dumps({"prompt": p}) + "\n" for p in ("a b", "c d")))
    assert sorted(data.load_prompts(str(folder))) == ["a b", "c d"]


def test_files(tmp_path):
    (tmp_path / "p.jsonl").write_text('{"prompt": "one"}\n{"prompt": [{"role": "user", "content": "two"}]}\n')
    assert data.load_prompts(str(tmp_path / "p.jsonl")) == ["one", [turn("user", "two")]]
    (tmp_path / "p.txt").write_text("one\ntwo\none\n")
    assert data.load_prompts(str(tmp_path / "p.txt")) == ["one", "two"]
    with pytest.raises(UsageError, match="cannot read"):
        data.load_prompts(str(tmp_path / "missing.txt"))
    with pytest.raises(UsageError, match="cannot load the dataset"):
        data.load_prompts(str(tmp_path / "nowhere"))
    with pytest.raises(UsageError, match="expected at least one row"):
        data.load_prompts(f"magpie={_save([{'instruction': '', 'quality': 'good'}], tmp_path / 'empty')}")


def test_held_out_prompts_are_not_trained_on():
    train, held_out = data.hold_out(list(range(10)), 3)
    assert train == list(range(7)) and held_out == [7, 8, 9]
    assert data.hold_out([1, 2], 0) == ([1, 2], [])
    with pytest.raises(UsageError, match="too few to hold out 10"):
        data.hold_out(list(range(10)), 10)
    train, held_out = data.tiny_prompts(100, 20)
    assert (len(train), len(held_out)) == (80, 20) and not set(train) & set(held_out)


def test_long_prompts_are_left_out(models):
    tokenizer = models[1]
    short, long = "Tell me about the inn.", "Tell me about the inn. " * 40
    assert data.within([short, long], tokenizer, 30) == [short]
    with pytest.raises(UsageError, match="all 1 prompts are longer than --max-prompt-tokens 30"):
        data.within([long], tokenizer, 30)
