"""What the error of a run is attributed to, as its `analysis` says: sensitivities, and the largest inputs."""

from __future__ import annotations

from torch import Tensor

from harness import records
from harness.config import RunConfig
from harness.evaluation import absmax, sensitivity
from harness.models import Decoder, matching
from harness.nn import swapped
from harness.quantization import Result
from harness.utils.disk_cache import DiskCache
from harness.utils.progress import Track, silent


class Analyser:
    """Observes a float model before it is quantized, and both models afterwards."""

    def __init__(
        self, decoder: Decoder, cfg: RunConfig, tokens: Tensor, cache: DiskCache, track: Track = silent
    ) -> None:
        """`decoder` is that of the model as loaded; `tokens` (B, T) are the calibration sequences."""
        self.decoder, self.cfg, self.tokens, self.cache, self.track = decoder, cfg.analysis, tokens, cache, track
        names = matching(list(decoder.linears()), cfg.analysis.outliers, "analysis.outliers")
        self.largest = absmax(decoder, names, tokens, cache, track) if names else {}

    def analyse(self, result: Result) -> records.Analysis:
        """The analysis of the model that `result` describes; each row of its layers takes the figures of its linear.

        The float linears that `result` holds are released.
        """
        outliers = self._outliers(result) if self.largest else {}
        analysis = records.Analysis(outliers=outliers)
        if self.cfg.sensitivity != "off":
            analysis = self._sensitivity(result, outliers)
        result.floats.clear()
        return analysis

    def _outliers(self, result: Result) -> dict[str, dict[str, list[float]]]:
        names = [result.renamed.get(name, name) for name in self.largest]
        with swapped(self.decoder.model, result.floats):
            largest_now = absmax(self.decoder, names, self.tokens, self.cache, self.track)
        pairs = zip(self.largest.items(), largest_now.values(), strict=True)
        return {name: {"before": before, "after": after} for (name, before), after in pairs}

    def _sensitivity(self, result: Result, outliers: dict[str, dict[str, list[float]]]) -> records.Analysis:
        assert self.cfg.sensitivity != "off"
        tokens = self.tokens[: self.cfg.windows]
        measured = sensitivity.measure(self.decoder, result.floats, tokens, self.cfg.sensitivity, self.track)
        figures = {row["name"]: row for row in measured.rows}
        for layer in result.layers:  # no linear has the name of a block
            row = figures.get(layer["name"], {})
            layer |= {key: value for key, value in row.items() if key not in ("name", "params")}
        total = {
            "by": self.cfg.sensitivity,
            "windows": tokens.shape[0],
            "seq_len": tokens.shape[1],
            "kl": measured.all.kl,
            "nll": measured.all.nll,
            "nll_float": measured.none.nll,
        }
        return records.Analysis(sensitivity=measured.rows, total=total, outliers=outliers)
