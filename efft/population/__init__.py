"""Runs that differ in numbers and not in shapes, trained together; see `efft.population.train`."""

from efft.alike import VARIES, common
from efft.population.train import train

__all__ = ['VARIES', 'common', 'train']
