"""Strict while testing: eight simulated devices, and our own warnings are errors.

(The latter is `filterwarnings` in pyproject.toml.) The environment is set here because jax reads it
once, at import; subprocesses of the tests inherit it.
"""

import os
import tempfile
from pathlib import Path

os.environ.setdefault('JAX_PLATFORMS', 'cpu')
os.environ.setdefault('JAX_NUM_CPU_DEVICES', '8')
# Compiling dominates tests of tiny models; a second run of the suite finds the programs made.
CACHE = Path(tempfile.gettempdir()) / f'efft-tests-{os.getuid()}'
os.environ.setdefault('JAX_COMPILATION_CACHE_DIR', str(CACHE / 'jax'))
os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0.2')
# A test that reaches for the network is wrong, and should fail at once.
os.environ.setdefault('HF_HUB_OFFLINE', '1')
os.environ.setdefault('TOKENIZERS_PARALLELISM', 'false')
# Processes started in other folders run this checkout, installed or not.
ROOT = str(Path(__file__).parents[1])
os.environ['PYTHONPATH'] = os.pathsep.join(filter(None, [ROOT, os.environ.get('PYTHONPATH')]))
