"""The modules that every run needs; the server process from which isolated runs are forked imports them once.

A decoder without weights is built, because transformers imports further modules for it. Nothing is computed: a process
cannot be forked safely after torch has started its threads.
"""

import gc
import threading

import accelerate  # noqa: F401 - loading weights imports it
import transformers.integrations  # noqa: F401
from tqdm import tqdm
from transformers import AutoConfig, AutoTokenizer  # noqa: F401

from harness import runs  # noqa: F401
from harness.models import skeleton

skeleton(AutoConfig.for_model("llama", hidden_size=32, num_hidden_layers=1))
# The default lock of progress bars is a semaphore of the system, which a killed run would leave, with a warning.
tqdm.set_lock(threading.RLock())
gc.collect()
gc.freeze()  # these objects live as long as the process: no run has to scan them, or to copy their memory pages
