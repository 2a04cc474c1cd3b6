"""Sweep: plan, store, runner, executors."""
