"""The stages of a job in their order."""

from launcher.context import Stage
from launcher.stages.compress import compress
from launcher.stages.evaluate import evaluate
from launcher.stages.export import export, verify
from launcher.stages.harness import check_harness, score_exports
from launcher.stages.planning import plan
from launcher.stages.prepare import prepare
from launcher.stages.recover import recover
from launcher.stages.report import report
from launcher.stages.train import train

STAGES: tuple[Stage, ...] = (
    prepare,
    check_harness,
    plan,
    train,
    compress,
    recover,
    evaluate,
    export,
    verify,
    score_exports,
    report,
)
