"""`--layout mlx-lm`: the language model alone, a plain Qwen2 folder, loaded by mlx-lm's own command line."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from fastvlm.data import scenes
from fastvlm.synthetic.checkpoint import write_checkpoint
from model_export import artefact, contract
from tests.model_export.test_flags import run  # noqa: F401
