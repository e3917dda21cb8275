#!/usr/bin/env bash
# Library: mlflow 3.17.2, its SQLite store, which is the default (Python 3.11).
# Behavior: a metric of infinity is stored as the largest double, 1.7976931348623157e+308, and read
#     back as that number; NaN comes back as NaN.
# Surprise: log_metric takes the value without a word, and isfinite of what was logged is True
#     afterwards: a run that diverged to infinity passes the check that looks for it, and the mean of
#     its losses is finite.
# Seen: mlflow 3.17.2: logged 1.0, inf, -inf, nan; read 1.0, 1.7976931348623157e+308,
#     -1.7976931348623157e+308, nan
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3.11}" -m venv "$work/venv"
"$work/venv/bin/pip" install -q mlflow==3.17.2

cat > "$work/check.py" << 'PY'
import logging
import math
import sys

import mlflow

logging.disable(logging.INFO)
mlflow.set_tracking_uri(f"sqlite:///{sys.argv[1]}/mlflow.db")
logged = [1.0, math.inf, -math.inf, math.nan]
with mlflow.start_run() as run:
    for step, loss in enumerate(logged):
        mlflow.log_metric("loss", loss, step=step)
history = mlflow.MlflowClient().get_metric_history(run.info.run_id, "loss")
read = [metric.value for metric in sorted(history, key=lambda metric: metric.step)]
print(f"mlflow {mlflow.__version__}: logged {logged}, read {read}")
assert read[0] == 1.0 and math.isnan(read[3])
assert read[1] == sys.float_info.max and read[2] == -sys.float_info.max, "infinity comes back"
PY
cd "$work" && "$work/venv/bin/python" -W ignore "$work/check.py" "$work"
