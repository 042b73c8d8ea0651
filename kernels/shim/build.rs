//! Compiles every kernel with the host's C++ compiler, and a table of where C++ puts the fields of the parameter structs.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::{env, fs};

fn main() {
    let cuda = Path::new(env!("CARGO_MANIFEST_DIR")).join("../cuda");
    let out = PathBuf::from(env::var("OUT_DIR").expect("cargo names a folder for results"));
    println!("cargo:rerun-if-changed={}", cuda.display());
    let mut kernels: Vec<PathBuf> = fs::read_dir(&cuda)
        .expect("kernels/cuda is a folder")
        .map(|entry| entry.expect("kernels/cuda can be read").path())
        .filter(|path| path.extension().is_some_and(|extension| extension == "cu"))
        .collect();
    kernels.sort();

    let mut build = cc::Build::new();
    build.cpp(true).std("c++17").opt_level(2).debug(false).warnings(true).extra_warnings(true);
    // The same sums on every machine that runs the tests, whether or not it has fused multiply-adds.
    build.define("KVERN_HOST_SHIM", None).include(&cuda).flag("-ffp-contract=off");
    // `#pragma unroll` is nvcc's.
    build.flag("-Wno-unknown-pragmas");
    // Entries register themselves, so that nothing refers to their files.
    build.link_lib_modifier("+whole-archive");
    for kernel in kernels {
        let name = kernel.file_stem().expect("a kernel file has a name").to_string_lossy().into_owned();
        let wrapper = out.join(format!("{name}.cpp"));
        write_if_new(&wrapper, &format!("#include \"{}\"\n", kernel.display()));
        build.file(wrapper);
    }
    let layout = out.join("layout.cpp");
    let params = fs::read_to_string(cuda.join("params.h")).expect("kernels/cuda/params.h can be read");
    write_if_new(&layout, &layout_table(&params));
    build
        .file(layout)
        .files(["shim", "hopper", "products"].map(|name| cuda.join("shim").join(name).with_extension("cpp")));
    build.compile("kvern_cuda_shim");
}

/// Keeps the time of an unchanged file.
fn write_if_new(path: &Path, text: &str) {
    if fs::read_to_string(path).ok().as_deref() != Some(text) {
        fs::write(path, text).expect("the folder for results can be written");
    }
}

/// C++ that tabulates struct, field, offset and size for every field in `params.h`, which has one per line.
fn layout_table(params: &str) -> String {
    let mut table = String::from(
        "#include \"params.h\"\n#include <stddef.h>\n\
         struct Field { const char *name; size_t offset, bytes; };\n\
         extern \"C\" const Field kvern_shim_fields[] = {\n",
    );
    let mut current = None;
    for line in params.lines() {
        if let Some(rest) = line.strip_prefix("struct ").and_then(|rest| rest.strip_suffix(" {")) {
            // After its alignment, where it has one.
            let name = rest.rsplit(' ').next().expect("a struct has a name");
            writeln!(table, "{{\"{name}\", 0, sizeof({name})}},").expect("a string takes all");
            current = Some(name);
        } else if line == "};" {
            current = None;
        } else if let Some(name) = current {
            let field =
                line.strip_suffix(';').and_then(|line| line.rsplit([' ', '*']).next()).expect("one field per line");
            let field = field.split('[').next().expect("an array has a name");
            writeln!(table, "{{\".{field}\", offsetof({name}, {field}), sizeof({name}::{field})}},")
                .expect("a string takes all");
        }
    }
    table + "{nullptr, 0, 0}};\n"
}
