"""Packaging of efft; pyproject.toml holds only the settings of ruff and pytest."""

import re
from pathlib import Path

from setuptools import setup

root = Path(__file__).parent
version = re.search(r"__version__ = '(.+)'", (root / 'efft' / '__init__.py').read_text())[1]
readme = root / 'README.md'
parts = sorted(
  '.'.join(file.parent.relative_to(root).parts) for file in root.glob('efft/**/__init__.py')
)
report = ['vl-convert-python>=1.9']
test = ['pytest>=8', 'pytest-xdist>=3.6', 'hypothesis>=6.100', 'selenium>=4.20', *report]

setup(
  name='efft',
  version=version,
  description='Cheap fine-tuning of BERT-like encoders in JAX',
  long_description=readme.read_text(encoding='utf-8') if readme.exists() else '',
  long_description_content_type='text/markdown',
  license='Apache-2.0',
  python_requires='>=3.11',
  # The configs are installed beside the code, where `--config=configs/lora.py` finds them.
  packages=[*parts, 'efft.configs'],
  package_dir={'efft': 'efft', 'efft.configs': 'configs'},
  package_data={'efft': ['methods.json'], 'efft.report': ['page.css', 'page.js']},
  entry_points={'console_scripts': ['efft=efft.main:main']},
  install_requires=[
    # Two pairs, not a cross product: jax 0.11 needs Python 3.12, flax 0.12.8 needs jax < 0.12.
    'jax>=0.10.2,<0.11; python_version < "3.12"',
    'flax==0.12.8; python_version < "3.12"',
    'jax>=0.11,<0.13; python_version >= "3.12"',
    'flax>=0.12.12,<0.13; python_version >= "3.12"',
    'absl-py>=2.1',
    'datasets>=5,<6',
    'huggingface-hub>=1',
    'ml-collections>=1.1,<2',
    'numpy>=2',
    'optax>=0.2.8,<0.3',
    'orbax-checkpoint>=0.12,<0.13',
    'pandas>=2.2',
    'pyarrow>=17',
    'rich>=13.7',
    'safetensors>=0.6,<1',
    'scikit-learn>=1.5',
    'scipy>=1.15',
    'tokenizers>=0.22',
    'transformers>=5.3,<6',
  ],
  extras_require={
    'test': test,
    'dev': [*test, 'ruff==0.17.*'],
    'report': report,
    'cuda': ['jax[cuda12]'],  # of the version that install_requires takes
    'tensorboard': ['tensorboardX>=2.6'],
    'wandb': ['wandb>=0.19.10'],
  },
)
