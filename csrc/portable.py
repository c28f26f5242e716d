"""Link a library so that it runs on systems older than the one that builds it.

Three things tie a library to the system it was linked on. libstdc++ is linked statically, and no
symbol of it (nor any other: the kernels register themselves when the library is loaded) is shown to
the process. glibc gives some functions a new version when they change or move between its files,
and a linker takes the newest; here it is shown small stand-ins of the old files, which know the
oldest version only, and every later glibc still has that one. And libstdc++'s headers look at a
variable of newer glibcs, which the library brings along instead. The rest is left as it is: what a
library then still needs, auditwheel tells (release.py).
"""

from __future__ import annotations

import platform
import subprocess
from pathlib import Path

#: The functions whose newest version is too new, by the file that had them first: what the CPU
#: kernels use, and what libcudart_static.a does. The loader looks for a name and its version in
#: whatever file has them, so exp may stand where it does; a stand-in for libm would hide the rest.
OLD_GLIBC = {
    "libdl.so.2": "dlclose dlerror dlmopen dlopen dlsym dlvsym",
    "librt.so.1": "shm_open shm_unlink",
    "libpthread.so.0": """
        exp log pow
        pthread_condattr_setpshared pthread_create pthread_detach pthread_getspecific pthread_join
        pthread_key_create pthread_key_delete pthread_kill pthread_mutex_trylock
        pthread_mutexattr_destroy pthread_mutexattr_init pthread_mutexattr_setpshared
        pthread_mutexattr_settype pthread_once pthread_rwlock_destroy pthread_rwlock_init
        pthread_rwlock_rdlock pthread_rwlock_timedrdlock pthread_rwlock_timedwrlock
        pthread_rwlock_tryrdlock pthread_rwlock_trywrlock pthread_rwlock_unlock
        pthread_rwlock_wrlock pthread_rwlockattr_destroy pthread_rwlockattr_init
        pthread_rwlockattr_setpshared pthread_setspecific pthread_spin_destroy pthread_spin_init
        pthread_spin_lock pthread_spin_trylock pthread_spin_unlock sem_destroy sem_init sem_post
        sem_timedwait sem_trywait sem_wait""",
}

#: The versions they had in glibc's first port to a processor, or in the release that brought them.
FIRST_VERSIONS = {
    "x86_64": "GLIBC_2.2.5 { global: *; }; GLIBC_2.3.4 { global: dlmopen; };",
    "aarch64": "GLIBC_2.17 { global: *; };",
}

#: glibc 2.32 has this variable; 0 means that the process may have more than one thread.
SINGLE_THREADED = """
__attribute__((visibility("hidden"))) char __libc_single_threaded = 0;
"""


def portable_link(compiler: list[str], folder: Path) -> list[str]:
    """Make the stand-ins in a folder; the options for the linker that use them.

    Raises:
        subprocess.CalledProcessError: the compiler fails, which has then said why.
    """
    folder.mkdir(parents=True, exist_ok=True)
    hide = folder / "hide.map"
    hide.write_text("{ local: *; };\n")
    options = ["-static-libstdc++", "-Wl,--gc-sections", f"-Wl,--version-script={hide}"]
    if platform.machine() not in FIRST_VERSIONS:
        return options

    def compile_c(text: str, output: Path, *flags: str) -> str:
        source = output.with_suffix(".c")
        source.write_text(text)
        command = [*compiler, "-x", "c", "-fPIC", "-fno-builtin", *flags, str(source)]
        subprocess.run([*command, "-o", str(output)], check=True)
        return str(output)

    options.append(compile_c(SINGLE_THREADED, folder / "single_threaded.o", "-c"))
    versions = folder / "versions.map"
    versions.write_text(FIRST_VERSIONS[platform.machine()])
    shared = ["-shared", "-nostdlib", f"-Wl,--version-script={versions}"]
    files = [
        compile_c(
            "".join(f"void {name}(void) {{}}\n" for name in names.split()),
            folder / file,
            *shared,
            f"-Wl,-soname,{file}",
        )
        for file, names in OLD_GLIBC.items()
    ]
    # Not "as needed": the linker would drop them before it comes to libstdc++, which needs them.
    return [*options, "-Wl,--no-as-needed", *files, "-Wl,--as-needed"]
