"""What scripts/cuda_kernels.py reads out of the compiler's report and PTX, and what it refuses."""

import unittest

import cuda_kernels

LOG = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'kvern_one' for 'sm_80'
ptxas info    : Function properties for kvern_one
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, 512 bytes smem, 392 bytes cmem[0]
ptxas info    : Compiling entry function 'kvern_two' for 'sm_90a'
ptxas info    : Function properties for kvern_two
    16 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 168 registers, used 0 barriers
"""
REMARK = ("ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized due to "
          "the presence of Extern calls in the function 'kvern_two'")
ROW = ["kvern_one", "sm_80", 40, 512, 0, ["wide", "mma"]]


def table(*rows):
    """A table as the file has it."""
    return cuda_kernels.parse_table("\n".join([cuda_kernels.HEADER, *map(cuda_kernels.format_row, rows)]))


class Report(unittest.TestCase):
    def test_rows_hold_registers_static_shared_memory_and_spills(self):
        self.assertEqual(cuda_kernels.resources(LOG),
                         [["kvern_one", "sm_80", 40, 512, 0], ["kvern_two", "sm_90a", 168, 0, 36]])

    def test_serialized_wgmma_is_found_though_it_is_information(self):
        self.assertEqual(cuda_kernels.serialized(LOG), [])
        self.assertEqual(cuda_kernels.serialized(LOG + REMARK + "\n"), [REMARK])
        # Numbers that only hold those digits are others.
        self.assertEqual(cuda_kernels.serialized("kvern_C7510 C751 C75100 xC7510"), [])

    def test_the_remark_changes_nothing_about_the_rows(self):
        self.assertEqual(cuda_kernels.resources(REMARK + "\n" + LOG), cuda_kernels.resources(LOG))


class Table(unittest.TestCase):
    def test_what_is_written_is_read_back(self):
        self.assertEqual(table(ROW, ["kvern_two", "sm_90a", 168, 0, 0, []]),
                         {("kvern_one", "sm_80"): (40, 512, {"wide", "mma"}), ("kvern_two", "sm_90a"): (168, 0, set())})

    def test_what_is_worse_than_the_table_is_told(self):
        cases = [
            (ROW, []),
            (["kvern_one", "sm_80", 39, 256, 0, ["wide", "mma", "tma"]], []),
            (["kvern_one", "sm_80", 41, 512, 0, ["wide", "mma"]],
             ["kvern_one for sm_80: expected at most 40 registers, found 41"]),
            (["kvern_one", "sm_80", 40, 528, 0, ["wide", "mma"]],
             ["kvern_one for sm_80: expected at most 512 bytes of static shared memory, found 528"]),
            (["kvern_one", "sm_80", 40, 512, 4, ["wide", "mma"]], ["kvern_one for sm_80 spills 4 bytes"]),
            (["kvern_one", "sm_80", 40, 512, 0, ["mma"]], ["kvern_one for sm_80 has lost: wide"]),
            (["kvern_two", "sm_80", 1, 0, 0, []],
             ["kvern_one for sm_80 is in the table and was not compiled", "kvern_two for sm_80 is not in the table"]),
        ]
        for row, expected in cases:
            with self.subTest(row=row):
                self.assertEqual(list(cuda_kernels.complaints([row], table(ROW))), expected)


class Ptx(unittest.TestCase):
    def test_memory_before_the_wait_is_out_of_turn(self):
        kernel = ".target sm_90a\n.visible .entry kvern_one(\n{0}\tgriddepcontrol.wait;\n\tld.global.f32 %f1, [%rd1];\n"
        load = "\tld.global.f32 %f1, [%rd1];\n"
        self.assertEqual(list(cuda_kernels.out_of_turn(kernel.format("\tld.param.u64 %rd1, [p];\n"))), [])
        self.assertEqual(list(cuda_kernels.out_of_turn(kernel.format(load))),
                         ["kvern_one has ld.global.f32 before it waits for the launches before"])
        self.assertEqual(list(cuda_kernels.out_of_turn(".target sm_90a\n.visible .entry kvern_one(\n" + load)),
                         ["kvern_one does not wait for the launches before"])
        self.assertEqual(list(cuda_kernels.out_of_turn(".target sm_80\n.visible .entry kvern_one(\n" + load)), [])


if __name__ == "__main__":
    unittest.main()
