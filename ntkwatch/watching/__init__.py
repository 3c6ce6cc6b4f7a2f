"""Watching one run: when to measure, what a failure does, what a checkpoint carries. No trainer's classes here.

In: a Monitor, a schedule, loggers, and a front end that says "a step happened".
Out: measurements in the record and in every logger; a state for the run's checkpoint.
Read `settings` (what a user passed), `setup` (from there to a session), `schedule` and `shared_schedule` (when),
`runner` and `session` (one run), `resume` and `checkpoint`, `rank_zero` (one rank measures for all), `error_policy`
(what a failure does), `results`, `messages`.
"""
