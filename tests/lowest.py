"""Print the lowest versions that setup.cfg admits, as constraints for pip; torch is left to constraints.txt."""

import configparser
from pathlib import Path

config = configparser.ConfigParser()
config.read(Path(__file__).resolve().parents[1] / "setup.cfg", encoding="utf-8")
listed = f"{config['options']['install_requires']}\n{config['options.extras_require']['test']}"
lowest = dict(line.split(">=") for line in listed.split() if ">=" in line)
del lowest["torch"]
print("\n".join(f"{name}=={version}" for name, version in lowest.items()))
