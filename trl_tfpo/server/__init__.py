# Copyright 2026 The trl-tfpo authors
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

"""
An OpenAI-compatible server: one patient, some doctors, and for every request its own weights.

`Engine` decodes what many clients ask for in one batch; `make_app` puts it behind HTTP. `trl-tfpo serve` runs both.
"""

from .app import make_app
from .engine import Engine, Generation, Limits


__all__ = ["Engine", "Generation", "Limits", "make_app"]
