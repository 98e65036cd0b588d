"""Reads rollouts and logs, decides nothing."""
