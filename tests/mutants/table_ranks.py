"""Bugs in what goes on beside a run: other ranks, the linear forecast, BatchNorm's baseline, output scales."""

from __future__ import annotations

from tests.mutants.planting import Bug

RANKS = (
    Bug(
        "agreement of one",
        "ranks agree where any of them says ok",
        "all agree or none",
        old="dist.ReduceOp.MIN",
        new="dist.ReduceOp.MAX",
        tests="test_distributed.py::test_both_ranks_say[agrees]\ntest_distributed.py::test_both_ranks_say[names_who_failed]",
    ),
    Bug(
        "group without a timeout",
        "a rank that does not come is waited for as long as torch waits",
        "absence raises in time",
        old="dist.new_group(backend='gloo', timeout=timedelta(seconds=ANY))",
        new="dist.new_group(backend='gloo')",
        tests="test_distributed.py::test_its_group_has_its_timeout",
    ),
    Bug(
        "everybody's own value",
        "broadcast returns what the rank itself brought",
        "rank 0's value on every rank",
        old="value if self.first() else pickle.loads(payload)",
        new="value",
        tests="test_distributed.py::test_both_ranks_say[broadcasts]",
    ),
    Bug(
        "gradients summed",
        "the forecast's gradients of several ranks are added, not averaged",
        "the mean over ranks, as DDP takes it",
        old="s / self.size",
        new="s",
        tests="test_distributed.py::test_both_ranks_say[joins]",
    ),
    Bug(
        "collectives after a failure",
        "a rank goes on talking to ranks that have gone on",
        "after a failure the group is given up",
        old="own.broken is not None",
        new="False",
        tests="test_distributed.py::test_absence_raises_in_time_and_training_goes_on\n"
        "test_distributed.py::test_absence_at_the_first_collective",
    ),
)

FORECAST = (
    Bug(
        "forecast without momentum",
        "the linear model's optimizer has no momentum",
        "the forecast trains as the run does",
        old="group.update(settings)",
        new="group.update({**settings, 'momentum': 0.0} if 'momentum' in settings else settings)",
        tests="diagnostics/test_forecast.py::test_a_linear_network_does_what_is_forecast[SGD, heavy ball, decay]",
    ),
    Bug(
        "forecast without weight decay",
        "the linear model's optimizer has no weight decay",
        "the forecast trains as the run does",
        old="group.update(settings)",
        new="group.update({**settings, 'weight_decay': 0.0})",
        tests="diagnostics/test_forecast.py::test_a_linear_network_does_what_is_forecast[SGD, heavy ball, decay]",
    ),
    Bug(
        "forecast at the rates of now",
        "the linear model steps with the learning rates that a scheduler has set since",
        "the rates of the run's own step",
        old="self._rule.step(how.rates, how.after, clip)",
        new="self._rule.step(self.rates(), self.rates(), clip)",
        tests="frontends/test_forecast_updates.py"
        "::test_a_linear_network_does_what_the_callback_forecasts[a schedule by step]",
    ),
    Bug(
        "forecast's time uncounted",
        "what the linear forecast takes is nobody's time",
        "overhead is all that the watch takes",
        old="self.schedule.aside()",
        new="true_precision(trainer)",
        tests="frontends/test_forecast_updates.py::test_its_time_is_overhead_and_no_probes",
    ),
    Bug(
        "forecast's time taken from probes",
        "what the linear forecast takes is charged to the probes' budget",
        "the forecast takes no probe away",
        old="self.aside_seconds += self.now() - since",
        new="self._spent += self.now() - since",
        tests="watching/test_schedule.py::test_time_aside_is_overhead_and_takes_no_probe_away",
    ),
    Bug(
        "forecast from nowhere",
        "the linear model's outputs lack f_0",
        "f_0 + J_0·Δθ",
        old="f_0.double() + moved.double()",
        new="moved.double()",
        tests="diagnostics/test_forecast.py::test_a_linear_network_does_what_is_forecast[SGD]",
    ),
    Bug(
        "calibration biased",
        "BatchNorm's calibrated variance is divided by n instead of n − 1",
        "calibration equals a training forward",
        old="(square / count - mean.square()) * ANY",
        new="square / count - mean.square()",
        tests="model/test_module.py::test_calibration_equals_a_training_forward\n"
        "model/test_module.py::test_calibration_pools_batches",
    ),
    Bug(
        "calibration of the last batch",
        "BatchNorm's calibration forgets all batches but the last",
        "calibration pools batches",
        old="(old[0] + count, old[1] + mean * count, old[2] + square * count)",
        new="(count, mean * count, square * count)",
        tests="model/test_module.py::test_calibration_pools_batches",
    ),
    Bug(
        "twins at half the speed",
        "an output-scale twin under SGD scales its rate by γ instead of γ²",
        "twins of a linear network learn one function",
        old="gamma**2 if sgd else gamma",
        new="gamma",
        tests="diagnostics/test_interventions.py::test_rates_follow_the_optimizers_rule\n"
        "diagnostics/test_interventions.py::test_a_linear_network_learns_the_same_function_at_every_scale",
    ),
    Bug(
        "twins' eps kept",
        "an output-scale twin under Adam keeps its ε",
        "ε/γ",
        old="group['eps'] / gamma",
        new="group['eps']",
        tests="diagnostics/test_interventions.py::test_rates_follow_the_optimizers_rule\n"
        "diagnostics/test_interventions.py::test_a_linear_network_learns_the_same_function_at_every_scale",
    ),
    Bug(
        "twins' decay kept",
        "an output-scale twin keeps its weight decay while its rate changes",
        "lr·weight decay is kept",
        old="group['weight_decay'] / factor",
        new="group['weight_decay']",
        tests="diagnostics/test_interventions.py::test_rates_follow_the_optimizers_rule",
    ),
    Bug(
        "twins' clipping kept",
        "an output-scale twin clips its scaled gradients at the user's threshold",
        "gradients are clipped at the size that they have without the scale",
        old="p.grad.mul_(factor)",
        new="pass",
        tests="diagnostics/test_interventions.py::test_clipping_thresholds_shrink_with_the_gradients",
    ),
    Bug(
        "twins' start forgotten",
        "a resumed twin subtracts the outputs of a new initialisation",
        "f_0 is that of the run",
        old="self._output_scale[2].load_state_dict(checkpoint[START])",
        new="pass",
        tests="diagnostics/test_interventions.py::test_a_resumed_run_subtracts_the_same_start",
    ),
    Bug(
        "adam uncorrected",
        "Adam's second moments are read without their correction for early steps",
        "the preconditioner is the optimizer's own",
        old="s[moment].detach().double() / correction",
        new="s[moment].detach().double()",
        tests="diagnostics/test_optimizers.py::test_a_step_of_the_optimizer_is_the_rule",
    ),
)
