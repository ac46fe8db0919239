"""Break the core on purpose, and see that the suite notices.

Each row changes one place of a copy of the package and runs the test files that ought to fail. A row whose text is no
longer in the source fails by itself, so the table cannot go stale.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

MUTATIONS = {
    "restore by subtraction": (
        "weights.py",
        "torch._foreach_copy_(self.params, self.copies)",
        "torch._foreach_sub_(self.params, [p - c for p, c in zip(self.params, self.copies)])",
        "test_exactness.py",
    ),
    "storage swapped": (
        "weights.py",
        "torch._foreach_copy_(self.params, self.copies)",
        "[setattr(p, 'data', c) for p, c in zip(self.params, self.copies)]",
        "test_exactness.py",
    ),
    "a block overwritten before its copy": (
        "weights.py",
        "            g.copy_(w)\n",
        "            w.copy_(displaced)\n            g.copy_(w)\n",
        "test_exactness.py test_interrupts.py",
    ),
    "rows not restored": (
        "weights.py",
        "self.param.index_copy_(0, self.rows, self.copy)",
        "pass",
        "test_exactness.py test_interrupts.py",
    ),
    "statistics updated twice": (
        "guards.py",
        "            buffer.copy_(copy)\n",
        "            pass\n",
        "test_guards.py",
    ),
    "no random state to replay": (
        "run.py",
        "guard.enter_step(replays=self.active and not one_pass)",
        "guard.enter_step(replays=False)",
        "test_guards.py",
    ),
    "an infinite sum taken for an infinity": (
        "norms.py",
        "if not math.isfinite(total) and not all(",
        "if not math.isfinite(total) or not all(",
        "test_norms.py",
    ),
    "masks not replayed": ("guards.py", "            self._begun.put()", "            pass", "test_guards.py"),
    "random state of two passes": ("guards.py", "            self._after.put()", "            pass", "test_guards.py"),
    "norm of the first group only": (
        "ascent.py",
        "norm = combine(group_norms, self.q)",
        "norm = group_norms[0]",
        "test_closed_forms.py test_oracles.py",
    ),
    "radius squared in the exponent": ("ascent.py", "pack, self.q - 1)", "pack, self.q)", "test_closed_forms.py"),
    "scaling applied once": (
        "ascent.py",
        "        if self.adaptive:\n            self._times_t(weights, grads)\n        return",
        "        return",
        "test_closed_forms.py",
    ),
    "groups of radius 0 in the norm": (
        "look.py",
        "            if rho <= 0:\n                continue\n",
        "",
        "test_closed_forms.py test_oracles.py",
    ),
    "micro-batches summed": ("run.py", "param.grad * weight", "param.grad * 1.0", "test_oracles.py"),
    "momentum not saved": (
        "saving.py",
        "        saved = self.base_optimizer.state_dict()",
        "        saved = {**self.base_optimizer.state_dict(), 'state': {}}",
        "test_state.py",
    ),
    "steps not counted": ("stepping.py", "group[STEP] += 1", "group[STEP] += 0", "test_state.py test_record.py"),
    "a copy loses its schedule": (
        "saving.py",
        "self.__dict__[name] for name in (*kept, *slots, *options)",
        'Schedule() if name == "_schedule" else self.__dict__[name] for name in (*kept, *slots, *options)',
        "test_state.py",
    ),
    "NaN handed to the base": ("update.py", "        if not finite:", "        if False:", "test_exactness.py"),
    "second pass without gradients enabled": (
        "passes.py",
        "with torch.enable_grad():",
        "with __import__('contextlib').nullcontext():",
        "test_record.py",
    ),
    "old gradients accepted": ("passes.py", "raise RuntimeError(STALE)", "pass", "test_errors.py"),
    "the perturbed loss returned": (
        "run.py",
        "record._perturbed_loss = later_pass(descend)",
        "record._perturbed_loss = loss = later_pass(descend)",
        "test_record.py test_exactness.py",
    ),
    "second-order term dropped": ("descent.py", "result[i] = term", "pass", "test_second_order.py"),
    "projection dropped": ("ascent.py", "        self._project()\n", "", "test_closed_forms.py test_oracles.py"),
    "what a method remembers not saved": (
        "saving.py",
        'saved["state"][index] = {**saved["state"].get(index, {}), **entries}',
        "pass",
        "test_family_state.py::test_resuming_equals_never_having_stopped",
    ),
    "rounded away from zero": ("rounding.py", "< (steps - below).abs()", "< 1.0", "test_precision.py"),
    "rounded at random the wrong way": ("rounding.py", "torch.copysign(up", "-torch.copysign(up", "test_precision.py"),
    "a last gradient left at its scale": (
        "run.py",
        "            record._perturbed_loss = later_pass(descend)\n        method.unscale()\n",
        "            record._perturbed_loss = later_pass(descend)\n",
        "test_scaling.py",
    ),
    "an overflow in the first pass forgotten": ("update.py", "if first and", "if False and", "test_scaling.py"),
    "statistics of an overflow kept": ("guards.py", "elif finite is False:", "elif False:", "test_scaling.py"),
    "gradients stretched to the norm": ("update.py", ", max=1.0)", ")", "test_accumulation.py"),
    "the first gradient clipped": (
        "look.py",
        "        norm = direction.turn(everything, self._method.memory)\n",
        "        norm = direction.turn(everything, self._method.memory)\n"
        "        torch._foreach_clamp_max_([piece.grad for piece in everything], 0.001)\n",
        "test_accumulation.py",
    ),
    "cleared between closures": (
        "accumulate.py",
        "            last = ",
        "            clear()\n            last = ",
        "test_accumulation.py",
    ),
    "flatwise's entries in the base's checkpoint": (
        "saving.py",
        'saved["state"], _ = split_state(saved["state"])',
        "pass",
        "test_family_state.py::test_checkpoints_of_the_plain_base_go_both_ways",
    ),
    "an average in half precision": (
        "memory.py",
        "torch.float32 if like.dtype in COARSE else like.dtype",
        "like.dtype",
        "test_family_state.py::test_dtypes_stay",
    ),
    "two passes where one is enough": (
        "run.py",
        "        if one_pass:\n            return loss\n",
        "",
        "test_family_passes.py::test_passes_and_calls_are_those_of_the_row",
    ),
    "noise from torch's own generator": (
        "directions.py",
        "torch.randn(weight.shape, generator=generator, ",
        "torch.randn(weight.shape, ",
        "test_family_passes.py::test_buffers_and_random_state_are_those_of_one_plain_pass",
    ),
    "ranking pass not the one that counts": (
        "run.py",
        "                guard.between()\n                index",
        "                index",
        "test_family_passes.py::test_buffers_and_random_state_are_those_of_one_plain_pass",
    ),
    "a late part after a withheld update": (
        "update.py",
        "    if finite is False:\n        return\n",
        "",
        "test_family_gradients.py::test_a_gradient_that_is_not_finite_after_the_first_pass",
    ),
    "weights not brought back on closing": (
        "look.py",
        "        self.undo()\n        self._guard.close(",
        "        self._guard.close(",
        "test_family_calls.py::test_an_error_in_any_call_leaves_the_weights_as_they_were",
    ),
    "parameters left frozen": (
        "look.py",
        "param.requires_grad_(True)",
        "pass",
        "test_family_calls.py::test_an_error_in_any_call_leaves_the_weights_as_they_were",
    ),
    "a part reused where the radius is 0": (
        "look.py",
        "reuses = method.descent.reuses and between",
        "reuses = method.descent.reuses",
        "test_family_descent.py::test_looksam_without_radius_forgets_to_reuse",
    ),
    "learned before the update": (
        "memory.py",
        "        self._next.setdefault(param, {})[name] = value",
        "        self.keep(param, name, value)",
        "faults/test_faults.py",
    ),
    "counted before the passes": (
        "stepping.py",
        "        run = self._new_run(record, active)\n        if",
        "        self._count()\n        run = self._new_run(record, active)\n        if",
        "faults/test_faults.py",
    ),
    "random state of a pass that raised": (
        "guards.py",
        "            self._after.put()",
        "            pass",
        "faults/test_faults.py",
    ),
    "an overflow in a late part not seen by the scaler": (
        "outside.py",
        "        if self._scaling.on and self._late:",
        "        if False and self._late:",
        "test_scaling.py",
    ),
    "a sample as light as its numbers": (
        "radius.py",
        "flat[::STRIDE] * math.sqrt(STRIDE)",
        "flat[::STRIDE] * 1.0",
        "test_radius.py",
    ),
    "a rise of the loss that has no say": (
        "radius.py",
        "if self.slope > 0 and",
        "if False and",
        "test_radius.py",
    ),
    "a slope across the gradient": (
        "wiring.py",
        "if self._acting.ascent.direction.uses_gradient else math.nan",
        "if True else math.nan",
        "test_auto.py::test_the_slope_is_one_along_the_gradient",
    ),
    "a look as far along the gradient as along the momentum": (
        "stepping.py",
        "[rho / stretch for rho in self._radii]",
        "[rho for rho in self._radii]",
        "test_auto.py::test_what_is_shown test_auto.py::test_a_look_uses_the_radius_along_the_gradient",
    ),
    "a radius set by an update that was withheld": (
        "wiring.py",
        "if auto is None or not self.last.updated or",
        "if auto is None or",
        "test_auto.py::test_a_look_without_an_update_changes_nothing",
    ),
    "keys of a failed step taken for new ones": (
        "scaling.py",
        "        if self._stepped:\n            self._passes",
        "        if True:\n            self._passes",
        "test_scaling.py",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MUTATIONS)
def test_the_suite_notices(name: str, tmp_path: Path) -> None:
    file, old, new, files = MUTATIONS[name]
    shutil.copytree(ROOT / "src" / "flatwise", tmp_path / "flatwise", ignore=shutil.ignore_patterns("__pycache__"))
    source = tmp_path / "flatwise" / file
    text = source.read_text()
    assert old in text, f"{file} no longer contains {old!r}"
    source.write_text(text.replace(old, new))
    tests = [str(ROOT / "tests" / test) for test in files.split()]
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-n", "0", *tests]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)
    # 1 is "tests failed"; anything else would be an accident, such as a file that does not import.
    assert run.returncode == 1, run.stdout[-2000:] + run.stderr[-2000:]
    assert "error" not in run.stdout.splitlines()[-1], run.stdout[-2000:]
