"""The analyses of a run that `analysis` selects: sensitivities of linears or blocks, and largest inputs."""

from __future__ import annotations

from torch import Tensor

from harness.config import RunConfig
from harness.evaluation import absmax, sensitivity
from harness.models import Decoder, matching
from harness.nn import swapped
from harness.quantization import Result
from harness.records import Analysis
from harness.utils.disk_cache import DiskCache
from harness.utils.progress import Track, silent


class Analyser:
    """Observes the float model before quantization, and the quantized model afterwards."""

    def __init__(
        self, decoder: Decoder, cfg: RunConfig, tokens: Tensor, cache: DiskCache, track: Track = silent
    ) -> None:
        """`decoder` is the decoder of the float model; `tokens` (B, T) are the calibration sequences."""
        self.decoder, self.cfg, self.tokens, self.cache, self.track = decoder, cfg.analysis, tokens, cache, track
        names = matching(list(decoder.linears()), cfg.analysis.outliers, "analysis.outliers")
        self.largest = absmax(decoder, names, tokens, cache, track) if names else {}

    def analyse(self, result: Result) -> Analysis:
        """Analyse the quantized model that `result` describes.

        The sensitivity of each linear is also added to its row in `result.layers`. At the end, the float linears in
        `result.floats` are released.
        """
        outliers = self._outliers(result) if self.largest else {}
        analysis = Analysis(outliers=outliers)
        if self.cfg.sensitivity != "off":
            analysis = self._sensitivity(result, outliers)
        result.floats.clear()
        return analysis

    def _outliers(self, result: Result) -> dict[str, dict[str, list[float]]]:
        """The largest inputs by linear and channel, of the float model `before` and `after` all rewrites."""
        names = [result.renamed.get(name, name) for name in self.largest]
        with swapped(self.decoder.model, result.floats):
            largest_now = absmax(self.decoder, names, self.tokens, self.cache, self.track)
        pairs = zip(self.largest.items(), largest_now.values(), strict=True)
        return {name: {"before": before, "after": after} for (name, before), after in pairs}

    def _sensitivity(self, result: Result, outliers: dict[str, dict[str, list[float]]]) -> Analysis:
        assert self.cfg.sensitivity != "off"
        tokens = self.tokens[: self.cfg.windows]
        measured = sensitivity.measure(self.decoder, result.floats, tokens, self.cfg.sensitivity, self.track)
        figures = {row["name"]: row for row in measured.rows}
        for layer in result.layers:  # rows of blocks do not match: no linear has the name of a block
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
        return Analysis(sensitivity=measured.rows, total=total, outliers=outliers)
