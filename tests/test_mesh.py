"""One run on one device, on eight, and on two hosts of four: the same losses."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny
from jax.sharding import PartitionSpec

from efft import mesh
from efft.errors import InputError


@pytest.fixture(scope='module')
def alone():
  return tiny.losses_on(mesh.make(1))


def test_eight_devices_see_the_losses_of_one(alone):
  """With dropout, in micro-batches, on batches that need padding."""
  devices = mesh.make()
  assert devices.size == 8, 'run the tests with eight simulated devices'
  np.testing.assert_allclose(tiny.losses_on(devices), alone, atol=1e-5)
  assert max(alone) - min(alone) > 1e-2


HOST = """
import json
from efft import mesh

mesh.initialize()
import jax
import numpy as np
import tiny

assert jax.process_count() == 2 and jax.local_device_count() == 4
devices = mesh.make()
found = tiny.losses_on(devices)
rows = mesh.put_batch({'weights': np.arange(6, dtype=np.float32)}, devices)['weights']
print(json.dumps({'losses': found, 'rows': mesh.gather(rows).tolist()}))
"""


def test_two_hosts_see_the_losses_of_one(alone):
  with socket.socket() as free:
    free.bind(('localhost', 0))
    port = free.getsockname()[1]

  def start(index):
    own = {
      'JAX_PLATFORMS': 'cpu',
      'JAX_NUM_CPU_DEVICES': '4',
      'JAX_COORDINATOR_ADDRESS': f'localhost:{port}',
      'JAX_NUM_PROCESSES': '2',
      'JAX_PROCESS_ID': str(index),
      'PYTHONPATH': os.pathsep.join(p for p in (str(Path(__file__).parent), *sys.path) if p),
    }
    # The other tests' simulated devices may come from here.
    environment = {k: v for k, v in os.environ.items() if k != 'XLA_FLAGS'} | own
    return subprocess.Popen(
      [sys.executable, '-c', HOST],
      env=environment,
      cwd=Path(__file__).parents[1],
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )

  hosts = [start(0), start(1)]
  try:
    outputs = [host.communicate(timeout=180) for host in hosts]
  finally:
    for host in hosts:
      host.kill()
  for host, (out, err) in zip(hosts, outputs, strict=True):
    assert host.returncode == 0, err
    found = json.loads(out.splitlines()[-1])
    np.testing.assert_allclose(found['losses'], alone, atol=1e-5)
    assert found['rows'] == [0, 1, 2, 3, 4, 5, 0, 0]


def test_batches_are_padded_with_rows_that_weigh_nothing():
  devices, rows = mesh.make(), tiny.batch(rows=5)
  for multiple, expected in ((1, 8), (2, 16)):
    put = mesh.put_batch(rows, devices, multiple)
    for name, x in put.items():
      assert x.shape == (expected, *rows[name].shape[1:]) and x.dtype == rows[name].dtype
      assert x.sharding.spec == PartitionSpec('data')
      np.testing.assert_array_equal(x[:5], rows[name])
    np.testing.assert_array_equal(put['weights'][5:], 0)
    assert put['mask'][5:].any(1).all(), 'no row without a token'


def test_batches_that_fit_are_not_padded():
  put = mesh.put_batch(tiny.batch(rows=8), mesh.make())
  assert put['weights'].shape == (8,)


def test_place_follows_the_first_rule_that_matches():
  devices = mesh.make()
  values = {'a': {'kernel': np.ones((8, 2)), 'bias': np.ones(2)}, 'b': np.ones((8, 3))}
  placed = mesh.place(values, devices, (('.*/kernel', ('data',)), ('.*', ())))
  assert placed['a']['kernel'].sharding.spec == PartitionSpec('data')
  assert placed['a']['bias'].is_fully_replicated and placed['b'].is_fully_replicated
  with pytest.raises(InputError, match='b'):
    mesh.place(values, devices, (('a/.*', ()),))


def test_replicate_and_gather_take_any_tree():
  devices = mesh.make()
  state = mesh.replicate((np.int32(3), {'x': np.arange(4.0)}, None), devices)
  assert all(x.is_fully_replicated for x in jax.tree.leaves(state))
  np.testing.assert_array_equal(mesh.gather(state[1]['x']), np.arange(4.0))
  rows = mesh.put_batch({'weights': np.arange(16.0)}, devices)['weights']
  np.testing.assert_array_equal(mesh.gather(rows), np.arange(16.0))


def test_more_devices_than_there_are():
  with pytest.raises(InputError, match='9 with 8 devices'):
    mesh.make(9)
  assert mesh.make(2).size == 2
