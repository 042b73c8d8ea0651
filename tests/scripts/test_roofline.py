"""The floors and aims of scripts/gpu/roofline.py."""

import contextlib
import io
import pathlib
import unittest

import roofline

SHAPE = pathlib.Path(roofline.__file__).resolve().parent / "shapes" / "llama-3.1-8b"
# As an H200's, measured: bytes read and operations, per second.
READ, PRODUCT = 4.3e12, 790e12


def shares(**changed):
    """What a run reaches that meets every aim exactly, but for what is `changed`; None leaves a workload out."""
    found = {workload: least for workload, (least, _) in roofline.AIMS.items()}
    found.update({name.replace("_", " "): share for name, share in changed.items()})
    return [(workload, share) for workload, share in found.items() if share is not None]


class Floors(unittest.TestCase):
    def test_a_model_of_8b(self):
        # By hand: weights 2 x 7,504,658,432 bytes; 131,072 bytes of K and V a token; attention 4 x 4096 x 32 operations a position.
        model = roofline.Model.read(SHAPE)
        weights, kv = 2 * 7_504_658_432, 131_072
        cases = [
            ("decode 1x1024", 1, (weights + 1040 * kv) / READ, "reads"),
            ("decode 32x4096", 32, (weights + 32 * 4112 * kv) / READ, "reads"),
            ("prefill 2048 hopper", 2048,
             (2 * (2048 * 6_979_321_856 + 525_336_576) + 4 * 4096 * 32 * 2048 * 2049 / 2) / PRODUCT, "products"),
        ]
        for workload, tokens, seconds, bound in cases:
            with self.subTest(workload=workload):
                found = roofline.floor(model, workload, READ, PRODUCT)
                self.assertEqual((found[0], found[2]), (tokens, bound))
                self.assertAlmostEqual(found[1] / seconds, 1, places=9)

    def test_the_share_is_of_the_floor_that_the_table_shows(self):
        model = roofline.Model.read(SHAPE)
        _, seconds, _ = roofline.floor(model, "decode 1x1024", READ, PRODUCT)
        rows = [{"workload": "decode 1x1024", "median": 1 / (1.25 * seconds)}, {"workload": "limit read", "median": 1}]
        table = io.StringIO()
        with contextlib.redirect_stdout(table):
            (workload, share), = roofline.report(SHAPE, rows, "a GPU", READ, PRODUCT)
        self.assertEqual(workload, "decode 1x1024")
        self.assertAlmostEqual(share, 0.8)
        self.assertTrue(table.getvalue().rstrip().endswith("1.25"), table.getvalue())


class Aims(unittest.TestCase):
    def test_a_run_that_reaches_each_exactly_meets_all(self):
        lines, missed = roofline.judged(shares())
        self.assertEqual((missed, len(lines)), (0, len(roofline.AIMS)))
        self.assertTrue(all(line.endswith(": met") for line in lines), lines)
        self.assertIn("aim: decode 1x1024: at most 1.15 floors, found 87.0%, 1.15 floors: met", lines)

    def test_each_is_missed_by_itself(self):
        for workload, (least, _) in roofline.AIMS.items():
            for reached in (least - 0.01, None):
                with self.subTest(workload=workload, reached=reached):
                    lines, missed = roofline.judged(shares(**{workload: reached}))
                    self.assertEqual(missed, 1)
                    line, = [line for line in lines if line.endswith(": MISSED")]
                    self.assertTrue(line.startswith(f"aim: {workload}: "), line)

    def test_of_several_kernels_the_fastest_counts(self):
        found = shares(prefill_2048=None) + [("prefill 2048 portable", 0.3), ("prefill 2048 hopper", 0.7)]
        self.assertEqual(roofline.judged(found)[1], 0)
        self.assertEqual(roofline.judged(found[:-1])[1], 1)
        # A longer prompt is another workload.
        self.assertEqual(roofline.judged(shares(prefill_2048=None) + [("prefill 20480", 0.9)])[1], 1)


if __name__ == "__main__":
    unittest.main()
