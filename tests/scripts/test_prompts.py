"""What scripts/gpu/prompts.py makes of figures: times, rates and ratios."""

import contextlib
import io
import json
import unittest

import prompts
import roofline

# 32 heads over 8 of 128 values.
MODEL = roofline.Model(layers=32, layer=1, head=1, q=4096, kv=1024, size=128)


def printed(**rates):
    """As kvern bench prints them, with a limit that is none of the workloads."""
    rows = [{"workload": f"attention {tokens}", "median": rate} for tokens, rate in rates.items()]
    return "\n".join(json.dumps(row) for row in [*rows, {"workload": "limit read", "median": 1.0}])


class Prompts(unittest.TestCase):
    def test_a_layer_takes_its_part_of_the_time_of_all_tokens(self):
        row, = prompts.measured(printed(**{"2048": 64_000.0}), [2048], "hopper", layers=32)
        self.assertEqual((row["prompt"], row["who"]), (2048, "kvern hopper"))
        self.assertAlmostEqual(row["seconds"], 1e-3)

    def test_a_prompt_that_was_not_measured_is_an_error(self):
        with self.assertRaisesRegex(SystemExit, "prompts of 8192 tokens .* found attention 2048, limit read"):
            prompts.measured(printed(**{"2048": 1.0}), [2048, 8192], "hopper", layers=1)

    def test_the_table_has_rates_and_the_fastest_peer(self):
        # By hand: 4 x 4096 x (1 + 2 + .. + 2048) operations.
        self.assertEqual(prompts.operations(MODEL, 2048), 4 * 4096 * 2_098_176)
        second = prompts.operations(MODEL, 2048) / 400e12
        rows = [{"prompt": 2048, "who": "kvern hopper", "seconds": 2 * second, "note": ""},
                {"prompt": 2048, "who": "torch flash", "seconds": 3 * second, "note": ""},
                {"prompt": 2048, "who": "torch cudnn", "seconds": second, "note": ""},
                {"prompt": 8192, "who": "torch flash", "not_measured": "no time left"}]
        table = io.StringIO()
        with contextlib.redirect_stdout(table):
            alone = prompts.report(MODEL, rows, 800e12)
        self.assertEqual(alone, [8192])
        lines = table.getvalue().splitlines()[1:]
        self.assertRegex(lines[0], r"^ *2048 kvern hopper +171\.9 +200\.0 +25\.0% +0\.50x$")
        self.assertRegex(lines[2], r"^ *2048 torch cudnn +85\.9 +400\.0 +50\.0% +1\.00x$")
        self.assertEqual(lines[3].split(maxsplit=3)[3], "not measured: no time left")


if __name__ == "__main__":
    unittest.main()
