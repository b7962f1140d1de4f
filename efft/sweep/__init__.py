"""Studies: many runs from one Python file, each made once, killed or not, and recorded.

    from efft.sweep import Run, grid, product, seeds

    def runs():
      for name in ('bitfit', 'lora'):
        for overrides in product(grid({'optim.lr': [1e-3, 3e-3]}), seeds(3)):
          yield Run(name, f'configs/{name}.py:task=sst2', overrides)

`efft sweep --study=FILE --workdir=DIR` makes what DIR/records.jsonl does not have. jax is imported
by the processes that train, not here.
"""

from efft.sweep.launch import sweep
from efft.sweep.space import (
  chain,
  choice,
  grid,
  listed,
  log_uniform,
  product,
  random,
  seeds,
  uniform,
)
from efft.sweep.study import Planned, Run, Study, load, plan

__all__ = [
  'Planned', 'Run', 'Study', 'chain', 'choice', 'grid', 'listed', 'load', 'log_uniform', 'plan',
  'product', 'random', 'seeds', 'sweep', 'uniform',
]  # fmt: skip
