"""What a run's error is attributed to, as its `analysis` asks: sensitivities, and the largest inputs."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from harness.config.schema import RunConfig
from harness.evaluation import sensitivity
from harness.evaluation.outliers import absmax
from harness.models.architecture import linears, matching
from harness.nn.linear import swapped
from harness.quantization.engine import Result
from harness.utils.disk_cache import DiskCache
from harness.utils.progress import Track, silent

Json = dict[str, Any]


class Analysis:
    """Looks at a float model before it is quantized, and at both once it is."""

    def __init__(
        self, model: nn.Module, cfg: RunConfig, tokens: Tensor, cache: DiskCache, track: Track = silent
    ) -> None:
        """`model` is as it was loaded; `tokens` (B, T) are the calibration sequences."""
        self.model, self.asked, self.tokens, self.cache, self.track = model, cfg.analysis, tokens, cache, track
        names = matching(list(linears(model)), cfg.analysis.outliers, "analysis.outliers")
        self.largest = absmax(model, names, tokens, cache, track) if names else {}

    def of(self, result: Result) -> Json:
        """The record's `analysis` of the model as `result` says it was quantized, whose rows take their own figures.

        The float linears that `result` holds are let go.
        """
        found = self._outliers(result) if self.largest else {}
        if self.asked.sensitivity != "off":
            found |= self._sensitivity(result)
        result.floats.clear()
        return found

    def _outliers(self, result: Result) -> Json:
        names = [result.renamed.get(name, name) for name in self.largest]
        with swapped(self.model, result.floats):
            now = absmax(self.model, names, self.tokens, self.cache, self.track)
        pairs = zip(self.largest.items(), now.values(), strict=True)
        return {"outliers": {name: {"before": was, "after": is_now} for (name, was), is_now in pairs}}

    def _sensitivity(self, result: Result) -> Json:
        assert self.asked.sensitivity != "off"
        tokens = self.tokens[: self.asked.windows]
        measured = sensitivity.measure(self.model, result.floats, tokens, self.asked.sensitivity, self.track)
        of_units = {row["name"]: row for row in measured.rows}
        for layer in result.layers:  # none of them has a block's name
            own = of_units.get(layer["name"], {})
            layer |= {key: value for key, value in own.items() if key not in ("name", "params")}
        total = {
            "by": self.asked.sensitivity,
            "windows": tokens.shape[0],
            "seq_len": tokens.shape[1],
            "kl": measured.all.kl,
            "nll": measured.all.nll,
            "nll_float": measured.none.nll,
        }
        return {"sensitivity": measured.rows, "total": total}
