"""The typed configuration of a run: its classes, and how Hydra's mapping becomes one. Every layer above reads it."""

from harness.config.build import build as build
from harness.config.changed import changed_options as changed_options
from harness.config.load import build_limits as build_limits
from harness.config.load import build_run as build_run
from harness.config.load import build_steps as build_steps
from harness.config.options import Decides as Decides
from harness.config.options import decides as decides
from harness.config.schema import AnalysisConfig as AnalysisConfig
from harness.config.schema import DataConfig as DataConfig
from harness.config.schema import Dtype as Dtype
from harness.config.schema import EngineConfig as EngineConfig
from harness.config.schema import JobConfig as JobConfig
from harness.config.schema import LimitsConfig as LimitsConfig
from harness.config.schema import MeasureConfig as MeasureConfig
from harness.config.schema import MixedConfig as MixedConfig
from harness.config.schema import ModelConfig as ModelConfig
from harness.config.schema import RunConfig as RunConfig
