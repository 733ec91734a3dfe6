"""The typed configuration of a run: its classes, and how they are built from Hydra's mapping.

All packages of higher rows read it. `cli` builds limits, `runs` builds the configuration of a run.
"""

from harness.config.build import build as build
from harness.config.changed import changed_options as changed_options
from harness.config.load import build_limits as build_limits
from harness.config.load import build_run as build_run
from harness.config.load import build_steps as build_steps
from harness.config.naming import folder_name as folder_name
from harness.config.naming import one_source as one_source
from harness.config.parts import AnalysisConfig as AnalysisConfig
from harness.config.parts import DataConfig as DataConfig
from harness.config.parts import Dtype as Dtype
from harness.config.parts import EngineConfig as EngineConfig
from harness.config.parts import LimitsConfig as LimitsConfig
from harness.config.parts import MeasureConfig as MeasureConfig
from harness.config.parts import MixedConfig as MixedConfig
from harness.config.parts import ModelConfig as ModelConfig
from harness.config.schema import JobConfig as JobConfig
from harness.config.schema import RunConfig as RunConfig
from harness.core.options import Decides as Decides
from harness.core.options import decides as decides
