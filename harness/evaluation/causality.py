"""Whether a model looks ahead: a perplexity means nothing if the logits of a token depend on the tokens after it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from harness.calibration import SAME_LOGITS, relative_error, within
from harness.models import logits, probe_tokens
from harness.utils.errors import LIMIT, short

_MESSAGE = "model={}: its logits depend on later tokens, as in an encoder, so perplexity is too low; expected a decoder"
_REMEDY = ", set is_decoder=true in config.json"


def warn_of_lookahead(model: nn.Module, name: str) -> list[str]:
    """The warning that the model called `name` looks ahead, if it does."""
    if not looks_ahead(model):
        return []
    config: Any = getattr(model, "config", None)
    message = _MESSAGE + (_REMEDY if getattr(config, "is_decoder", None) is False else "")
    return [message.format(short(name, LIMIT - len(message)))]


def looks_ahead(model: nn.Module) -> bool:
    """Whether the logits of a few tokens change by more than rounding if only the token after them changes.

    False also if the model cannot run on token ids alone, or if its logits change from one forward to the next.
    """
    try:
        tokens = probe_tokens(model)
        changed = tokens.clone()
        changed[0, -1] = tokens[0, 0]
        limit = SAME_LOGITS[next(model.parameters()).dtype]  # logits may be float32 in a model of another dtype
        before = _earlier(model, tokens)
        if within(relative_error(_earlier(model, changed), before), limit):
            return False
        return within(relative_error(_earlier(model, tokens), before), limit)
    except Exception:  # whatever the model's code raises here, scoring decides what the run does
        return False


def _earlier(model: nn.Module, tokens: Tensor) -> Tensor:
    """Logits (T - 1, V) of all tokens (1, T) but the last, less their mean, which changes no probability."""
    earlier = logits(model, tokens)[0, :-1]
    earlier = earlier.to(torch.promote_types(earlier.dtype, torch.float32))
    return earlier - earlier.mean(-1, keepdim=True)
