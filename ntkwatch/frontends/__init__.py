"""One thin adapter per training loop. They tell the watch that a step happened, and no more.

In: a framework's trainer and its hooks. Out: calls of `watching`.
Read `loop` (`watch`: any training loop), `lightning` (the NTKWatch callback), `baseline_setup` and
`session_setup` (from a Trainer to a session), `stream_probes` (probes of a stream), `continuation` (a checkpoint, a
second fit), `trainer` and `record_place` (what is read of a Trainer), `forecast_updates` and `forecast_support` (the
linearized network beside the run), `environment` (NTKWATCH=1).
"""
