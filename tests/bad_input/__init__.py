# SPDX-License-Identifier: Apache-2.0

"""
Wrong input for every public function, command and endpoint: one file for each stage of the package.

A row of a table has a name for the fault, the call, and a part of the message. An error states the rule, the value
got and the remedy, and nothing is written.
"""
