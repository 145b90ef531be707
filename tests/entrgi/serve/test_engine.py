"""The queue and its batches: nothing depends on the company, places are given back, a bad request spoils no other."""

from __future__ import annotations

import asyncio
import time

import pytest
import torch

from entrgi.serve import engine as engine_module
from entrgi.serve.engine import Accepted, Frame, Outcome, canvas_text
from entrgi.serve.settings import Limits, Refusal

PROMPTS = ["What did you think of the soup?", "How was the film?", "Tell me about the hotel.", "And the tea?"]


def texts(outcome):
    return [sample.text for sample in outcome.result.samples]


@pytest.mark.parametrize("method", ["none", "entrgi"])
def test_a_request_gets_the_same_alone_and_in_a_crowd(sampler, engine, together, order, method):
    """Of its own seed, prompt and settings alone; and what the sampler gives for them without a server."""
    alone, crowded = engine(sampler, batch_size=1), engine(sampler)
    orders = [order(prompt, method=method, seed=seed) for prompt in PROMPTS[:3] for seed in (1, 2)]
    orders += [order(PROMPTS[0], method=method, seed=1), order(PROMPTS[0], method="aps", seed=1)]
    crowd = together(crowded, orders)
    assert max(outcome.together for outcome in crowd) > 1
    for one, among in zip(orders, crowd, strict=True):
        (own,) = together(alone, [one])
        assert own.together == 1 and texts(own) == texts(among)
        assert own.result.rewards == pytest.approx(among.result.rewards, abs=1e-3)
        assert among.result.config.seed == one.config.seed
    ((_, result),) = sampler.stream([PROMPTS[0]], seeds=[1], method=method, max_new_tokens=8, steps=4, num_samples=1)
    assert texts(crowd[0]) == texts(crowd[6]) == [sample.text for sample in result.samples]
    assert texts(crowd[0]) != texts(crowd[1])


def test_only_requests_of_one_shape_share_a_batch(stepper, engine, together, order):
    made = engine(stepper)
    stepper.go()
    shapes = [dict(), dict(steps=3), dict(temperature=1.0), dict(num_samples=2), dict(trace=True)]
    outcomes = together(made, [order(prompt, seed=i, **shape) for i, shape in enumerate(shapes) for prompt in PROMPTS])
    for batch in stepper.batches:
        assert len(batch) <= len(PROMPTS)
    for place, outcome in enumerate(outcomes):
        assert outcome.result.config.seed == place // len(PROMPTS)
        assert bool(outcome.result.samples[0].trace) == (place // len(PROMPTS) == 4)


def test_a_burst_is_one_batch(stepper, engine, together, order):
    """Its requests come one by one: the first does not run alone, nor with the second alone."""
    stepper.go()
    outcomes = together(engine(stepper, batch_size=16), [order(seed=seed) for seed in range(12)])
    assert [len(batch) for batch in stepper.batches] == [12] and {outcome.together for outcome in outcomes} == {12}


def test_a_batch_keeps_within_the_memory_budget(stepper, engine, together, order):
    orders = [order(prompt, seed=seed) for seed in range(4) for prompt in PROMPTS]
    turns = orders[0].conversation
    from entrgi_kernels.text.template import encode_prompt

    ids = encode_prompt(stepper.tokenizer, turns)
    needed = stepper.memory_estimate(turns, ids, orders[0].config)
    stepper.go()
    made = engine(stepper, budget=int(needed(3, len(ids) + 4)))
    assert all(isinstance(outcome, Outcome) for outcome in together(made, orders))
    sizes = [len(batch) for batch in stepper.batches]
    assert 2 <= max(sizes) <= 3 and sum(sizes) == 16


def test_beyond_the_queue_a_request_is_sent_away_and_told_when_to_come_back(stepper, engine, order):
    made = engine(stepper, Limits(queue=2))

    async def run():
        running = asyncio.ensure_future(collect(made, order()))
        await asyncio.to_thread(stepper.entered.wait, 10)
        waiting = [asyncio.ensure_future(collect(made, order(steps=3))) for _ in range(2)]
        while made.load["waiting"] < 2:
            await asyncio.sleep(0.01)
        with pytest.raises(Refusal, match="2 requests are waiting.*--max-queue") as caught:
            await collect(made, order())
        assert caught.value.status == 429 and caught.value.retry_after >= 1
        waiting[0].cancel()  # a client goes away: its place is free
        await asyncio.sleep(0.05)
        assert made.load == {"waiting": 1, "running": 1}
        more = asyncio.ensure_future(collect(made, order(steps=3)))
        stepper.go()
        return await asyncio.gather(running, waiting[1], more)

    assert all(isinstance(events[-1], Outcome) for events in asyncio.run(run()))


def test_a_full_queue_turns_no_prompt_into_tokens(stepper, engine, order, monkeypatch):
    made = engine(stepper, Limits(queue=1))
    asked, admit = [], made._admit
    monkeypatch.setattr(made, "_admit", lambda one: (asked.append(one), admit(one))[1])

    async def run():
        orders = [order(seed=seed) for seed in range(8)]
        got = await asyncio.wait_for(
            asyncio.gather(*(collect(made, one) for one in orders), return_exceptions=True), 60
        )
        return [one for one in got if isinstance(one, Refusal)]

    stepper.go()
    refused = asyncio.run(run())
    assert len(refused) == 7 == 8 - len(asked) and {one.status for one in refused} == {429}


def test_a_batch_whose_clients_have_all_gone_stops(stepper, engine, together, order):
    made = engine(stepper)

    async def run():
        clients = [asyncio.ensure_future(collect(made, order(prompt))) for prompt in PROMPTS[:2]]
        await asyncio.to_thread(stepper.entered.wait, 10)
        for client in clients:
            client.cancel()
        for _ in range(500):
            if made.load == {"waiting": 0, "running": 0}:
                return
            await asyncio.sleep(0.01)

    asyncio.run(run())
    assert made.load == {"waiting": 0, "running": 0} and stepper.steps == 1
    stepper.go()
    assert isinstance(together(made, [order()])[0], Outcome), "and the engine serves on"


def test_what_is_not_done_in_time_is_given_up(stepper, engine, order):
    made = engine(stepper, Limits(timeout=0.3))

    async def run():
        running = asyncio.ensure_future(collect(made, order()))
        await asyncio.to_thread(stepper.entered.wait, 10)
        waiting = asyncio.ensure_future(collect(made, order(steps=3)))
        return await asyncio.wait_for(asyncio.gather(running, waiting, return_exceptions=True), 20)

    for refusal in asyncio.run(run()):
        assert isinstance(refusal, Refusal) and refusal.status == 504 and "--timeout" in refusal.message


def test_the_time_to_be_admitted_counts(sampler, engine, together, order, monkeypatch):
    made = engine(sampler, Limits(timeout=0.2))
    admit = made._admit
    monkeypatch.setattr(made, "_admit", lambda one: (time.sleep(0.5), admit(one))[1])
    (refusal,) = together(made, [order()])
    assert isinstance(refusal, Refusal) and refusal.status == 504


def test_shutting_down_finishes_what_runs_and_sends_away_what_waits(stepper, engine, order):
    made = engine(stepper)

    async def run():
        running = asyncio.ensure_future(collect(made, order()))
        await asyncio.to_thread(stepper.entered.wait, 10)
        waiting = asyncio.ensure_future(collect(made, order(steps=3)))
        while not made.load["waiting"]:
            await asyncio.sleep(0.01)
        made.drain()
        late = asyncio.ensure_future(collect(made, order()))
        stepper.go()
        return await asyncio.gather(running, waiting, late, return_exceptions=True)

    done, waited, late = asyncio.run(run())
    assert isinstance(done[-1], Outcome)
    assert [waited.status, late.status] == [503, 503] and "shutting down" in made.trouble


def test_a_bad_request_spoils_no_other(sampler, stepper, engine, together, order, monkeypatch):
    stream = sampler.stream

    def picky(prompts, **options):
        if any(turns[-1]["content"] == PROMPTS[1] for turns in prompts):
            raise ValueError("prompt 1: expected another")
        return stream(prompts, **options)

    monkeypatch.setattr(sampler, "stream", picky)
    stepper.go()
    made = engine(stepper)
    good, bad, *rest = together(made, [order(prompt, seed=i) for i, prompt in enumerate(PROMPTS)])
    assert isinstance(bad, Refusal) and bad.status == 400 and bad.message == "prompt 1: expected another"
    assert all(isinstance(outcome, Outcome) for outcome in (good, *rest)) and made.trouble is None


def test_an_engine_that_fails_again_and_again_says_so(sampler, engine, together, order, monkeypatch):
    def broken(prompts, **options):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    made = engine(sampler)
    with monkeypatch.context() as patched:
        patched.setattr(sampler, "stream", broken)
        for _ in range(3):
            (refusal,) = together(made, [order()])
            assert refusal.status == 500 and "RuntimeError" in refusal.message and "illegal" not in refusal.message
    assert "3 batches failed" in made.trouble
    assert isinstance(together(made, [order()])[0], Outcome) and made.trouble is None


def test_settings_that_overflow_are_the_requests_own_affair(sampler, engine, together, order, caplog):
    """The server is well, and its log does not hold the prompt."""
    made = engine(sampler)
    for _ in range(3):
        (refusal,) = together(made, [order(weight="threshold(1e308, 1e308)")])
        assert refusal.status == 422 and "nan" in refusal.message
    assert made.trouble is None and "NonFiniteRewardError" in caplog.text and "soup" not in caplog.text


def test_samples_without_a_reward_put_no_prompt_in_the_log(sampler, together, order, caplog, monkeypatch):
    from entrgi.serve import server
    from entrgi.serve.settings import Served

    monkeypatch.setattr(type(sampler), "score", lambda self, turns, texts, batch_size: [float("nan")] * len(texts))
    made = server.make_engine({"tiny": sampler}, Served("tiny", ("tiny",), 1, order().config, False, Limits(), True))
    (outcome,) = together(made, [order()])
    made.close(timeout=10)
    assert isinstance(outcome, Outcome) and "soup" not in caplog.text


@pytest.mark.parametrize("trace", [False, True])
def test_frames_show_the_canvas_after_each_step(sampler, engine, order, trace):
    made = engine(sampler)
    asked = order(num_samples=2, watched=True, trace=trace)
    first, *frames, last = asyncio.run(collect(made, asked))
    assert isinstance(first, Accepted) and first.prompt_tokens == last.prompt_tokens > 5
    assert [frame.step for frame in frames] == list(range(4)) and all(isinstance(frame, Frame) for frame in frames)
    assert frames[-1].canvases == [sample.text for sample in last.result.samples]
    opened = [sum(canvas.count("░") for canvas in frame.canvases) for frame in frames]
    assert opened == sorted(opened, reverse=True) and opened[0] > opened[-1] == 0
    for frame in frames:
        assert (frame.traces is not None) == trace
        for k, step in enumerate(frame.traces or []):
            assert step.to_dict() == last.result.samples[k].trace[frame.step].to_dict()
            assert frame.canvases[k] == canvas_text(sampler, step.tokens)


def test_a_sample_that_ended_with_an_earlier_block_has_no_more_steps(sampler, engine, order):
    asked = order(num_samples=4, max_new_tokens=32, steps=32, block_length=4, watched=True, trace=True)
    _, *frames, last = asyncio.run(collect(engine(sampler), asked))
    ends = [sample.trace[-1].step for sample in last.result.samples]
    assert min(ends) < max(ends), "some end early, or this tests nothing"
    for frame in frames:
        for sample, step in zip(last.result.samples, frame.traces, strict=True):
            own = [one for one in sample.trace if one.step == frame.step]
            assert [step] == (own or [None])


def test_no_step_is_shown_twice_where_a_batch_fails_and_runs_again(sampler, engine, order, monkeypatch):
    stream = sampler.stream

    def failing(prompts, watch, **options):
        def fails(progress):
            watch(progress)
            if len(prompts) > 1 and progress.step == 2:
                raise RuntimeError("some kernel failed")

        return stream(prompts, watch=fails, **options)

    monkeypatch.setattr(sampler, "stream", failing)
    made = engine(sampler)

    async def run():
        return await asyncio.gather(*(collect(made, order(prompt, watched=True)) for prompt in PROMPTS[:2]))

    for events in asyncio.run(run()):
        assert [event.step for event in events[1:-1]] == list(range(4)) and events[-1].together == 1


def test_samples_that_memory_tears_apart_are_in_no_frame(sampler, engine, order, monkeypatch):
    """A canvas of some of the samples would be taken for that of others."""
    denoise = sampler.denoise

    def small(canvas, *arguments, **options):
        if len(canvas.tokens) > 1:
            raise torch.OutOfMemoryError
        return denoise(canvas, *arguments, **options)

    monkeypatch.setattr(sampler, "denoise", small)
    first, last = asyncio.run(collect(engine(sampler), order(num_samples=2, watched=True)))
    assert isinstance(first, Accepted) and len(last.result.samples) == 2


def test_a_slow_reader_misses_frames_and_gets_the_outcome(sampler, engine, order):
    made = engine(sampler)

    async def run():
        events = []
        async for event in made.run(order(max_new_tokens=100, steps=100, method="none", watched=True)):
            events.append(event)
            if len(events) == 2:
                while made.load["running"]:
                    await asyncio.sleep(0.01)
        return events

    events = asyncio.run(run())
    assert len(events) < 100 and isinstance(events[-1], Outcome) and events[-2].step == 99


def test_rewards_are_weighed_together_as_asked(sampler, engine, together, order, tiny_weights):
    from entrgi import tiny
    from entrgi_kernels import GuidedSampler

    judged = GuidedSampler(sampler.model, *tiny.load_judge()[:1], sampler.tokenizer, tiny.load_judge()[1])
    made = engine({"tiny": sampler, "judge": judged})
    each = [(("tiny", 1.0),), (("judge", 1.0),), (("judge", 0.5), ("tiny", -2.0))]
    first, second, both = together(made, [order(method="none", seed=1, rewards=rewards) for rewards in each])
    assert texts(first) == texts(second) == texts(both)
    expected = 0.5 * second.result.rewards[0] - 2 * first.result.rewards[0]
    assert both.result.rewards[0] == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize(
    ("prompt", "said"),
    [(" ", "prompt.* is empty"), ("a \ud800 b", "lone surrogate"), ("word " * 300, "expected at most 200")],
)
def test_messages_that_no_model_reads_are_refused_before_the_queue(sampler, engine, together, order, prompt, said):
    made = engine(sampler, Limits(prompt_tokens=200))
    (refusal,) = together(made, [order(prompt)])
    assert isinstance(refusal, Refusal) and refusal.status == 400 and refusal.param == "messages"
    with pytest.raises(Refusal, match=said):
        raise refusal


def test_a_frame_that_meets_its_leaving_client_does_not_bring_it_back(order):
    async def run():
        job = engine_module._Job(order(), [], 0.0, 1.0)

        class Late:
            @property
            def __class__(self):  # what the engine's thread asks of it, and the client leaves
                job.over = True
                return Frame

        job.put(Late())
        return job.over

    assert asyncio.run(run())


async def collect(engine, order):
    return [event async for event in engine.run(order)]
