"""Imported once by the server that isolated runs are forked from: what every run would import anew.

A decoder without weights is built, so that what transformers imports on the way is there too. Nothing is computed: a
process that has started the threads of its arithmetic cannot be forked.
"""

import gc

import accelerate  # noqa: F401 - loading weights imports it
import transformers.integrations  # noqa: F401
from transformers import AutoConfig, AutoTokenizer  # noqa: F401

from harness import runs  # noqa: F401
from harness.models import skeleton

skeleton(AutoConfig.for_model("llama", hidden_size=32, num_hidden_layers=1))
gc.collect()
gc.freeze()  # what is here by now lives as long as the process: no run has to look through it, or copy its pages
