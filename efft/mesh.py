"""Devices: one mesh with a data axis, batches cut along it, parameters placed by path rules."""

import os
import re
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from efft import tree
from efft.errors import InputError

REPLICATED = (('.*', ()),)


def make(devices: int | None = None) -> Mesh:
  """A mesh with the one axis 'data' over all devices of all hosts.

  Args:
    devices: how many of this host's devices to use (a single host only); None for all.
  """
  found = jax.devices()
  if devices is not None:
    if devices > len(found) or jax.process_count() > 1:
      raise InputError(
        'config.mesh.devices',
        f'{devices} with {len(found)} devices on {jax.process_count()} hosts',
        'at most the devices of a single host',
        'leave it out to use all',
      )
    found = found[:devices]
  # Explicit axes, make_mesh's default, would ask every lookup for its output's sharding.
  return jax.make_mesh((len(found),), ('data',), axis_types=(AxisType.Auto,), devices=found)


def initialize() -> None:
  """Joins the other hosts of a run, which jax finds from the environment (TPU pods, Slurm, or
  JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID)."""
  if jax.distributed.is_initialized():
    return
  # Of these three variables jax itself reads the address alone.
  count, index = (os.environ.get(name) for name in ('JAX_NUM_PROCESSES', 'JAX_PROCESS_ID'))
  jax.distributed.initialize(
    num_processes=None if count is None else int(count),
    process_id=None if index is None else int(index),
    initialization_timeout=1800,
  )


def place(values: Mapping, mesh: Mesh, rules: Sequence[tuple[str, tuple]] = REPLICATED) -> dict:
  """Puts a tree of host or device arrays on the mesh.

  Args:
    values: nested dictionary.
    mesh: from `make`.
    rules: (path regex, partition spec) pairs, first match wins; the default keeps a copy of
      everything on every device.
  """
  compiled = [(re.compile(pattern), PartitionSpec(*spec)) for pattern, spec in rules]

  def put(path, x):
    spec = next((spec for pattern, spec in compiled if pattern.fullmatch(path)), None)
    if spec is None:
      raise InputError('sharding rules', path, 'a rule for every path', "end with ('.*', ())")
    return _to_device(x, NamedSharding(mesh, spec))

  return tree.map_paths(put, values)


def replicate(values, mesh: Mesh):
  """Any pytree, copied to every device of the mesh."""
  sharding = NamedSharding(mesh, PartitionSpec())
  return jax.tree.map(lambda x: _to_device(x, sharding), values)


def put_batch(batch: Mapping[str, np.ndarray], mesh: Mesh, multiple: int = 1) -> dict:
  """A global host batch -> device arrays, rows cut over the data axis.

  Every host holds the whole batch (it is a pure function of seed and step) and hands its devices
  their part. Rows are added, with weight 0, until they divide by devices x `multiple`.

  Args:
    batch: arrays [B, ...] with 'weights' [B].
    mesh: from `make`.
    multiple: what each device's rows must divide by (micro-batches).
  """
  rows = len(batch['weights'])
  missing = -rows % (mesh.size * multiple)
  sharding = NamedSharding(mesh, PartitionSpec('data'))

  def put(name, x):
    if missing:
      # Copies of a real row: an all-masked row would be a needless special case downstream.
      filler = np.zeros_like(x[:1]) if name == 'weights' else x[:1]
      x = np.concatenate([x, np.repeat(filler, missing, axis=0)])
    return _to_device(x, sharding)

  return {name: put(name, x) for name, x in batch.items()}


def gather(x) -> np.ndarray:
  """A device array, wherever its parts are, as one host array on every host."""
  if jax.process_count() > 1 and not x.is_fully_replicated:
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(x, tiled=True))
  return np.asarray(x)


def _to_device(x, sharding: NamedSharding):
  if jax.process_count() == 1:
    return jax.device_put(x, sharding)

  def put(x):
    x = np.asarray(x)
    return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

  return jax.tree.map(put, x)  # a QTensor has parts
