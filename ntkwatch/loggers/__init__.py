"""Numbers and pictures to TensorBoard, W&B, CSV and any logger that offers `log_metrics`.

In: Measurements and a list of loggers. Out: their dashboards. A logger that fails is reported once, and costs itself
alone.
Read `group` (all loggers of a run), `adapters` (how each kind of logger is called), `pictures` and `tensorboard` (what
they show), `memory` (a logger for tests and notebooks).
"""
