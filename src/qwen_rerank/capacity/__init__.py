"""Capacity: how many machines a load needs, by arithmetic from measured figures and by a simulation of the queues."""

from qwen_rerank.capacity.planning import Plan, Speed, make_plan, read_speeds, server_times, shipped_speeds
from qwen_rerank.capacity.queueing import Failures, ServerTimes, SimulatedTraffic, poisson_arrivals, simulate

__all__ = [
    "Failures",
    "Plan",
    "ServerTimes",
    "SimulatedTraffic",
    "Speed",
    "make_plan",
    "poisson_arrivals",
    "read_speeds",
    "server_times",
    "shipped_speeds",
    "simulate",
]
