"""Compiled calls: the logits of eager calls at every position, no break in any format, and no fallback to eager."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from harness import quantization
from harness.config import build_run
from harness.evaluation import compiled, energy
from harness.evaluation.energy import Meter
from harness.evaluation.latency import latency
from harness.evaluation.workload import Eager
from harness.models import Decoder
from harness.models import open as open_source
from harness.nn import kvcache
from harness.runs import execute_run
from harness.runs.identity import unused
from tests.conftest import resolve, run_id_of
from tests.support.families import build, uneven

Tiny = Callable[..., dict[str, Any]]
TOKENS = torch.randint(3, 128, (2, 24), generator=torch.Generator().manual_seed(1))
PROMPT, DECODED = TOKENS[:, :15], TOKENS[:, 15:]
TIMED = ("measure=quick", "measure.prompt_len=8", "measure.decode_tokens=2", "measure.repeats=1")
COMPILE = torch.compile


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trace calls into one graph without generating code for it, which takes seconds."""
    same = {"fullgraph": True, "dynamic": False, "isolate_recompiles": True, "backend": "eager"}
    monkeypatch.setattr(torch, "compile", lambda forward, **_: COMPILE(forward, **same))


@pytest.mark.usefixtures("traced")
@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", {}),
        ("mistral", {"sliding_window": 6}),
        ("gemma2", {"sliding_window": 6}),
        ("gpt2", {}),  # learned positions
        ("bloom", {}),  # a bias by distance instead of positions
    ],
)
def test_logits_are_those_of_eager_calls_at_every_position(
    family: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiled, "_PROVED_STEPS", DECODED.shape[1])
    monkeypatch.setattr(compiled, "SAME_FUNCTION", {torch.float32: 1e-5})
    model = uneven(build(family, **options))
    workload, baseline = compiled.prepare((model, model), PROMPT, DECODED)
    assert baseline is workload
    with torch.inference_mode():
        step, again = workload.decode(workload.prefill()), workload.decode(None)
        first = step().clone()
        assert not torch.equal(step(), first)
        assert torch.equal(again(), first), "decoding begins after the prompt, whatever was decoded before"


def test_every_call_is_compiled_without_guards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch takes the filter of guards out of the options that it is given."""
    filters: list[Any] = []

    def taking(forward: Callable[..., Any], options: dict[str, Any], **_: Any) -> Callable[..., Any]:
        filters.append(options.pop("guard_filter_fn", None))
        return forward

    monkeypatch.setattr(torch, "compile", taking)
    compiled.prepare((build("llama"), build("llama")), PROMPT, DECODED)
    assert filters == [torch.compiler.skip_all_guards_unsafe] * 4


@pytest.mark.usefixtures("traced")
@pytest.mark.parametrize("off", [-1, 1])
def test_a_token_at_another_position_is_no_proof(off: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def shifted(self: compiled.Compiled) -> Any:
        for i, column in enumerate(self.decoded.split(1, dim=1)):
            self._token.copy_(column)
            self._start.fill_(self.prompt.shape[1] + i + (off if i == 1 else 0))
            yield self._step(self._token)

    monkeypatch.setattr(compiled.Compiled, "_steps", shifted)
    model = uneven(build("llama"))
    message = r"^measure.runtime=compiled: the logits of LlamaForCausalLM after 2 decode steps differ .*runtime=eager$"
    with pytest.raises(ValueError, match=message):
        compiled.prepare((model, model), PROMPT, DECODED)


class Graph:
    """Replaces torch.cuda.CUDAGraph: a replay runs the call again on the same memory and overwrites its output."""

    def __init__(self, forward: compiled.Forward) -> None:
        self.forward = forward

    def call(self, tokens: Tensor) -> Tensor:
        self.tokens, self.logits = tokens, self.forward(tokens).clone()
        return self.logits

    def replay(self) -> None:
        self.logits.copy_(self.forward(self.tokens))


def test_a_graph_reads_its_tokens_and_writes_its_logits_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    model = uneven(build("llama"))
    streams = SimpleNamespace(wait_stream=lambda _: None)
    for name, fake in (("Stream", streams), ("current_stream", streams), ("stream", nullcontext()), ("graph", None)):
        monkeypatch.setattr(torch.cuda, name, lambda *_, fake=fake: fake or nullcontext())

    def capture(forward: compiled.Forward, tokens: Tensor) -> compiled.Forward:
        graph = Graph(forward)
        monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: graph)
        return compiled._captured(graph.call, tokens)

    monkeypatch.setattr(compiled, "_compile", capture)
    monkeypatch.setattr(compiled, "_PROVED_STEPS", DECODED.shape[1])
    workload, _ = compiled.prepare((model, model), PROMPT, DECODED)
    with torch.inference_mode():
        step = workload.decode(workload.prefill())
        first = step()
        assert step().data_ptr() == first.data_ptr()


@pytest.mark.usefixtures("traced")
@pytest.mark.parametrize(
    "options",
    [
        ("method=rtn", "bits=3"),
        ("method=rtn", "scheme=w8a8_token"),
        ("method=rtn", "scheme=w4a4_token"),
        ("method=gptq", "method.gptq.act_order=true"),
        ("method=nf4",),
        ("method=quip_sharp", "bits=2"),
    ],
)
def test_formats_compile_into_one_graph(options: tuple[str, ...]) -> None:
    cfg = build_run(resolve("model=tiny", *options))
    model = open_source(cfg.model, cfg.seed).load(torch.float32, torch.device("cpu"))
    quantization.quantize(Decoder(model), cfg, TOKENS)
    compiled.prepare((model, model), PROMPT, DECODED)


def test_generated_code_is_timed_and_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    model, baseline = (build("llama", num_hidden_layers=1) for _ in range(2))
    pair = compiled.prepare((model, baseline), PROMPT, DECODED)
    assert pair[0] is not pair[1]
    cfg = build_run(resolve("model=tiny", "measure.warmup=1", "measure.decode_tokens=8", "measure.repeats=1")).measure
    result = latency(pair, cfg)
    assert result.warnings == []
    eager = latency((Eager(model, PROMPT, DECODED), Eager(baseline, PROMPT, DECODED)), cfg)
    assert set(result.metrics) == set(eager.metrics)
    assert result.metrics["kv_mib"] == eager.metrics["kv_mib"]
    monkeypatch.setattr(energy, "_BLOCK_S", 0.0)
    readings = iter(range(10**6))
    joules = energy.energy(pair, Meter("fake", lambda: [next(readings)], (0,), 1.0))
    assert all(value > 0 for value in joules.values())
    assert len(joules) == 4


def test_without_a_compiler_nothing_is_timed(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch._inductor.config.cpp, "cxx", ("no-such-compiler",))
    monkeypatch.setattr(torch._inductor.config, "force_disable_caches", True)
    record = execute_run(tiny(*TIMED, "method=none", "measure.runtime=compiled"))[0]
    assert record.status == "ok", record.error
    assert "perplexity" in record.metrics
    assert not [name for name in record.metrics if "prefill" in name or "decode" in name]
    (warning,) = record.warnings
    assert warning.startswith("measure: measure.runtime=compiled: the forward of LlamaForCausalLM failed (")
    assert "C++ compiler" in warning
    assert warning.endswith("; latency not measured")


@pytest.mark.usefixtures("traced")
def test_a_model_without_keys_and_values_is_not_timed(tiny: Tiny) -> None:
    raw = tiny(*TIMED, "method=none", "measure.runtime=compiled")
    shape = {"vocab_size": 256, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8}
    raw["model"]["architecture"] = {"model_type": "mamba", **shape}
    record = execute_run(raw)[0]
    assert record.status == "ok", record.error
    assert "prefill_ms_p50" not in record.metrics
    assert "measure: MambaForCausalLM returns no past_key_values; latency not measured" in record.warnings


def test_a_fixed_cache_has_the_layers_of_the_cache_that_it_replaces() -> None:
    model, start = build("llama"), torch.tensor(0)
    filled = model(input_ids=PROMPT, use_cache=True).past_key_values
    cache = kvcache.fixed(model, filled, 24, start)
    assert [layer.keys.shape for layer in cache.layers] == [(2, 2, 24, 8)] * 2
    start.fill_(20)
    states = torch.ones(2, 2, 3, 8)
    keys, values = cache.update(states, 2 * states, 1)
    assert keys.sum() == states.sum() == keys[:, :, 20:23].sum()
    assert values.sum() == 2 * states.sum()
    assert cache.get_seq_length() == 20
    assert kvcache.held_bytes(cache) == 2 * 2 * 4 * keys.numel()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["measure.runtime=fast"], r"^measure.runtime='fast' is unknown; expected one of: eager, compiled$"),
        (["measure.latency=false", "measure.runtime=compiled"], r"^measure.runtime=compiled has no use with latency=F"),
        (
            ["kv=kv8_token", "measure.runtime=compiled"],
            r"^measure.runtime=compiled with kv=kv8_token: a compiled model ",
        ),
    ],
)
def test_settings_that_exclude_each_other(overrides: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_run(resolve("model=tiny", *overrides))


def test_the_runtime_is_part_of_the_run_id_and_eager_runs_do_not_reach_its_code(tiny: Tiny) -> None:
    eager, other = tiny(*TIMED), tiny(*TIMED, "measure.runtime=compiled")
    before = tiny(*TIMED)
    del before["measure"]["runtime"]
    assert run_id_of(eager) == run_id_of(before) != run_id_of(other)
    assert compiled.__name__ in unused(build_run(eager))
    assert compiled.__name__ not in unused(build_run(other))
