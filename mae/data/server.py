"""Imported by the fork server alone: what the workers need is loaded once, and signals are left to the main process."""

import mae.data.loader  # noqa: F401
from mae.data.worker import leave_signals_to_the_main_process

leave_signals_to_the_main_process()
