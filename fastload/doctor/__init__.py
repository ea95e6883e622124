"""What this machine can do, which of it bounds a load, and what commonly breaks: behind ``fastload doctor``.

limits    what this process may use: cores, memory, open files
rates     what the machine does in a second, measured in a few seconds
bounds    which of these a load of given files waits for, and what to change; pure
checks    what commonly breaks: cache folder, hub, proxies, plugins
examine   all of it, for one call
"""

from .bounds import Estimate, Stage, Weights, estimate
from .checks import Check
from .examine import Examination, examine
from .rates import Cost, Rates

__all__ = ["Check", "Cost", "Estimate", "Examination", "Rates", "Stage", "Weights", "estimate", "examine"]
