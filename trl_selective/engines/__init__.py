"""Inference engines that draw the policy's half of guided rollouts: vLLM, in this process or behind a server.

Nothing is imported here: a server loads `processor.py` and what that needs, which is torch and a page of code.
"""
