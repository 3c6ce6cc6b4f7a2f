"""Numbers and pictures to TensorBoard, W&B, CSV and any logger that offers `log_metrics`.

In: Measurements and a list of loggers. Out: their dashboards. A logger that fails is reported once, and costs itself
alone.
"""
