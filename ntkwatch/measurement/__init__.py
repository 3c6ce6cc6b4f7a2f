"""Monitor: model, probes and baseline → Measurement.

In: a module, a ProbeSet, the names of diagnostics. Out: `Measurement`s, the first of which sets K_0 and θ_0.
Read `monitor` first; `arguments` checks what a user passes, `baseline` keeps K_0 and θ_0, `reductions` derives smaller
kernels from the richest, `infinite_limit` adds K∞, `manifest` describes a run, `cost` plans one probe.
"""
