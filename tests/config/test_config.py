"""The typed configuration: each wrong key, type or value gives one line that names it and says what to do."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from operator import attrgetter
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from torch import Tensor, nn

from harness.config import RunConfig, build, build_run, build_steps
from harness.core import FloatActivation, FloatWeight, IntActivation, IntWeight, Method, Scheme
from harness.utils.errors import Conflict, Refusal, choices
from methods.rtn import RTN
from tests.conftest import ROOT, resolve

Tiny = Callable[..., dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Fields(Method):
    ratio: float = 0.5
    rounds: int = 3
    order: bool = False
    tag: str | None = None


class Loose(RTN):
    """A method without its own @dataclass."""


@pytest.mark.parametrize("folder", ["model", "scheme", "kv", "data", "measure"])
def test_every_shipped_config_builds(folder: str, tmp_path: Path) -> None:
    for path in sorted((ROOT / "conf" / folder).glob("*.yaml")):
        overrides = [f"{folder}={path.stem}"] + (["data.path=x"] if path.stem == "text_file" else [])
        assert isinstance(build_run(resolve(*overrides)), RunConfig), path


def test_a_model_that_needs_bos_sets_it_and_the_command_line_wins() -> None:
    assert resolve("model=gemma3_270m")["data"]["bos"] == "always"
    assert resolve("model=gemma3_270m", "data=wikitext2", "data.path=x")["data"]["bos"] == "always"
    assert resolve("model=gemma3_270m", "data.bos=never")["data"]["bos"] == "never"
    assert resolve("experiment=bench", "model=gemma3_270m")["data"]["bos"] == "always"
    assert resolve("model=smollm2")["data"]["bos"] == "protocol"


def test_data_configs_have_the_same_keys() -> None:
    keys = [set(resolve(f"data={path.stem}")["data"]) for path in (ROOT / "conf/data").glob("*.yaml")]
    assert all(names == keys[0] for names in keys)
    assert {"seq_len", "max_windows", "num_samples", "calibration_seq_len", "protocol"} <= keys[0]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("bits=9", r"^scheme.weight.bits=9 is out of range; expected 2 to 8$"),
        ("bits=1", r"^scheme.weight.bits=1 is out of range; expected 2 to 8$"),
        ("bits=four", r"^scheme.weight.bits='four' has type str; expected int$"),
        ("scheme.weight.grid=narow", r"^scheme.weight.grid='narow' is unknown; did you mean narrow\? expected one of"),
        (
            "scheme.weight.group_size=0",
            r"^scheme.weight.group_size=0 is out of range; expected a positive number, or -1$",
        ),
        ("scheme.weight.granularity=channel", r"^scheme.weight.group_size=64 has no use with granularity=channel"),
        ("+scheme.weight.grd=full", r"^scheme.weight.grd='full' is an unknown key; did you mean scheme.weight.grid\?$"),
        ("+method.rtn.steps=3", r"^method.rtn.steps=3 is an unknown key; method.rtn has no keys$"),
        ("+engine.tokens=3", r"^engine.tokens=3 is an unknown key; did you mean engine.search_tokens"),
        ("method.rtn._target_=methods.rtn.RTM", r"^method.rtn._target_=methods.rtn.RTM cannot be imported"),
        (
            "method.rtn._target_=pathlib.Path",
            r"^method.rtn._target_=pathlib.Path is not a method; expected a class with @dataclass",
        ),
        ("model.dtype=int8", r"^model.dtype='int8' is unknown; expected one of: auto, float64"),
        ("data.seq_len=1", r"^data.seq_len=1 is out of range; expected 2 or more$"),
        ("data.max_windows=0", r"^data.max_windows=0 is out of range; expected 1 or more$"),
        ("data.protocol=slid", r"^data.protocol='slid' is unknown; expected one of: gptq, strided, llamacpp$"),
        ("data.protocol=strided", r"^data.stride=None is out of range with protocol=strided; expected 1 to 2047"),
        ("data.stride=512", r"^data.stride=512 has no use with protocol=gptq; use null, or protocol=strided$"),
        ("measure.repeats=-1", r"^measure.repeats=-1 is out of range; expected 1 or more$"),
        ("execution=fast", r"^execution='fast' is unknown; expected one of: packed, simulated$"),
        ("skip=null", r"^skip=None is not a list; expected \[value, \.\.\.\]$"),
        ("mixed.widths=four", r"^mixed.widths='four' has type str; expected int$"),
        ("model.package=null", r"^model.path=None and 0 of package, id, architecture are set"),
        ("scheme.weight.grid=narrow", r"^scheme.weight.grid=narrow has no use with symmetric=false"),
        ("seed=-1", r"^seed=-1 is out of range; expected 0 to 2\^63 - 1$"),
        ("method.rtn._target_=tests.config.test_config.Loose", r"Loose is not a method; expected a class with @data"),
        ("seed=1.5", r"^seed=1.5 has type float; expected int$"),
        ("force=1", r"^force=1 has type int; expected bool$"),
    ],
)
def test_errors(override: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_run(resolve(override))


@pytest.mark.parametrize(
    ("override", "name", "value"),
    [
        ("skip='*.down_proj'", "skip", ("*.down_proj",)),
        ("skip=['*.down_proj','*.up_proj']", "skip", ("*.down_proj", "*.up_proj")),
        ("analysis.outliers='*.down_proj'", "analysis.outliers", ("*.down_proj",)),
        ("mixed.widths=4", "mixed.widths", (4,)),
    ],
)
def test_a_single_value_is_a_list_of_one(override: str, name: str, value: tuple[Any, ...]) -> None:
    assert attrgetter(name)(build_run(resolve(override))) == value


@pytest.mark.parametrize("key", ["method.damp", "gptq.damp", "damp", "method.gptq.dampp", "percdamp"])
def test_a_shortened_or_misspelt_key_suggests_the_full_key(key: str) -> None:
    with pytest.raises(Refusal, match=rf"^{key}=0.5 is an unknown key; did you mean method.gptq.damp\?$"):
        build_run(resolve("method=gptq", f"+{key}=0.5"))


def test_a_key_that_two_parts_have_suggests_both() -> None:
    with pytest.raises(Refusal, match="did you mean data.batch_size or measure.batch_size\\?$"):
        build_run(resolve("+batch_size=2"))


def test_a_long_list_of_choices_is_cut() -> None:
    message = choices("x", [f"choice{i}" for i in range(100)], "--help")
    assert message.startswith("expected one of: choice0, choice1, ")
    assert message.endswith(" more (--help lists all)")
    assert len(message) < 130


def test_values_that_exclude_each_other_are_a_conflict_and_others_are_not() -> None:
    with pytest.raises(Conflict, match="^save=x cannot keep the changes that method.rotate makes"):
        build_run(resolve("save=x", "method=rotate"))
    with pytest.raises(Refusal) as wrong:
        build_run(resolve("bits=9"))
    assert not isinstance(wrong.value, Conflict)


def test_text_file_without_a_path() -> None:
    with pytest.raises(ValueError, match=r"^data.path=None; expected a text file to evaluate on"):
        build_run(resolve("data=text_file"))


def test_method_fields_are_the_keys_and_their_types() -> None:
    assert build(Fields, {"ratio": 1, "tag": 7, "order": True}, "method.f") == Fields(ratio=1.0, tag="7", order=True)
    with pytest.raises(ValueError, match=r"^method.f.rounds=2.5 has type float; expected int$"):
        build(Fields, {"rounds": 2.5}, "method.f")
    with pytest.raises(ValueError, match=r"^method.f.rounds=True has type bool; expected int$"):
        build(Fields, {"rounds": True}, "method.f")


OWN_FLOATS = {"element": "e3m2", "granularity": "group", "group_size": 16, "scale_dtype": "e8m0", "scale_rule": "ceil"}


def test_a_scheme_of_ones_own_needs_no_code() -> None:
    """The keys say whether a format is of integers or of small floats, for weights and inputs separately."""
    tokens = {"bits": 8, "symmetric": True}
    own = build(Scheme, {"name": "own", "weight": OWN_FLOATS, "activation": tokens}, "scheme")
    assert own.weight == FloatWeight(**OWN_FLOATS)
    assert own.activation == IntActivation(**tokens)
    own = build(Scheme, {"name": "own", "weight": {"bits": 3}, "activation": {"element": "e4m3"}}, "scheme")
    assert own.weight == IntWeight(bits=3)
    assert own.activation == FloatActivation(element="e4m3")


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (OWN_FLOATS | {"element": "e9m9"}, "scheme.weight.element=e9m9 is no float of 3 to 8 bits; expected e and"),
        (OWN_FLOATS | {"scale_dtype": "e5m3"}, "scheme.weight.scale_dtype='e5m3' is unknown; did you mean e4m3?"),
        (OWN_FLOATS | {"groupsize": 16}, "scheme.weight.groupsize=16 is an unknown key; did you mean scheme.weight.gr"),
        (OWN_FLOATS | {"scale_rule": "floor", "top": 20}, "scheme.weight.top=20 has no use with scale_rule=floor; set"),
        ({"element": 4}, "scheme.weight.element=4 is no float of 3 to 8 bits"),
        ({"bits": 4, "elements": "e2m1"}, "scheme.weight.elements='e2m1' is an unknown key; did you mean"),
        ({"group_size": 16}, "scheme.weight.bits is missing"),
        (7, "scheme.weight=7 is not a mapping"),
    ],
)
def test_an_impossible_scheme_is_one_line_that_names_the_key(weight: Any, message: str) -> None:
    with pytest.raises(Refusal) as caught:
        build(Scheme, {"name": "own", "weight": weight}, "scheme")
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("experiment", ["latency", "w8a16_blocks"])
def test_the_runs_of_a_shipped_sweep_build(experiment: str) -> None:
    sweeps = yaml.safe_load((ROOT / f"conf/experiment/{experiment}.yaml").read_text())["hydra"]["sweeper"]["sweeps"]
    for sweep in sweeps:
        parsed = OverridesParser.create().parse_overrides(sweep.split())
        first = [
            f"{item.key_or_group}={next(item.sweep_string_iterator())}" if item.is_sweep_override() else item.input_line
            for item in parsed
        ]
        cfg = build_run(resolve(f"experiment={experiment}", *map(str, first)))
        assert cfg.model.package is not None


@dataclass(frozen=True, kw_only=True)
class Rewrites(Method):
    def prepare(self, model: nn.Module, weights: Mapping[str, Tensor]) -> None:
        """Change nothing."""


def test_the_last_step_that_overrides_quantize_chooses_the_codes(tiny: Tiny) -> None:
    rewrites, rtn = {"_target_": "tests.config.test_config.Rewrites"}, {"_target_": "methods.rtn.RTN"}
    awq, gptq = {"_target_": "methods.awq.AWQ"}, {"_target_": "methods.gptq.GPTQ"}
    for steps, quantizing in [
        ({"first": rewrites, "gptq": gptq}, "gptq"),
        ({"awq": awq, "gptq": gptq}, "gptq"),
        ({"first": rewrites, "awq": awq}, "awq"),
        ({"rtn": rtn}, "rtn"),
        ({"first": rewrites}, "first"),  # it rounds to nearest
    ]:
        cfg = replace(build_run(tiny()), steps=build_steps(steps))
        assert list(cfg.steps) == list(steps)
        assert cfg.quantizing == quantizing
    assert replace(build_run(tiny()), steps={}).quantizing is None


@pytest.mark.parametrize(
    ("names", "idle", "chooser"),
    [
        (["gptq", "rtn"], "gptq", "rtn"),
        (["gptq", "again"], "gptq", "again"),
        (["awq", "gptq", "rtn"], "gptq", "rtn"),
        (["gptq", "rewrites"], "rewrites", "gptq"),
        (["gptq", "awq"], "gptq", "awq"),
    ],
)
def test_a_step_with_nothing_to_do_is_refused(names: list[str], idle: str, chooser: str) -> None:
    targets = {
        "rtn": "methods.rtn.RTN",
        "awq": "methods.awq.AWQ",
        "gptq": "methods.gptq.GPTQ",
        "again": "methods.gptq.GPTQ",
        "rewrites": "tests.config.test_config.Rewrites",
    }
    message = rf"^method={'_'.join(names)}: step {idle} has nothing to do, because {chooser} chooses"
    with pytest.raises(ValueError, match=message):
        build_steps({name: {"_target_": targets[name]} for name in names})


def test_a_method_that_is_not_a_mapping_of_steps_is_refused() -> None:
    with pytest.raises(ValueError, match=r"method=\[1\] is not a mapping of steps"):
        build_steps([1])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="method.rtn=3 is an unknown key"):
        build_steps({"rtn": 3})
    with pytest.raises(ValueError, match="method.rtn=.* has no _target_"):
        build_steps({"rtn": {"steps": 3}})


def test_none_has_no_scheme(tiny: Tiny) -> None:
    cfg = build_run(tiny("method=none"))
    assert cfg.scheme is None
    assert cfg.steps == {}


def test_rtn_takes_bits_and_scheme(tiny: Tiny) -> None:
    cfg = build_run(tiny("bits=3", "scheme=group32_sym"))
    assert isinstance(cfg.steps["rtn"], RTN)
    assert cfg.scheme is not None
    weight = cfg.scheme.weight
    assert (weight.bits, weight.group_size, weight.symmetric, weight.granularity) == (3, 32, True, "group")


def test_bits_that_have_no_effect_give_a_warning(tiny: Tiny) -> None:
    assert build_run(tiny("scheme=w8a8_token")).warnings == ()
    (warning,) = build_run(tiny("scheme=w8a8_token", "bits=3")).warnings
    assert warning == "bits=3 has no effect: scheme=w8a8_token sets scheme.weight.bits=8"
