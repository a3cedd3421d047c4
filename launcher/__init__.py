"""Turns a JobSpec into work on a cluster: spec, planner, back-ends, Ray coordinator, worker groups, journal, MLflow.

Imports torch only inside worker processes.
"""
