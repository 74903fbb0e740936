"""Tests run on profile tiny with their own directories; both are set before sbp_assets.partitions is imported."""

import os
import tempfile

os.environ["SBP_PROFILE"] = "tiny"
os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
_root = tempfile.mkdtemp(prefix="sbp-tests-")
for _name in ("data_dir", "work_dir", "instance_dir"):
    os.environ[f"SBP_DEPLOYMENT__{_name.upper()}"] = f"{_root}/{_name}"
