#!/usr/bin/env bash
# launch/hold.sh COMMAND...: runs it for a script on another machine, for as long as that is heard. Reads `export` lines for the
# command's environment, a line RUN, and then an empty line each second. When none has come for 15 seconds (a cable is cut), when
# the line is END (the rest of the run has failed) or when no more can come (the script was killed), everything that the command
# has started is ended; in the last case it may save before.
set -uo pipefail
while IFS= read -r line && [ "$line" != RUN ]; do eval "$line"; done
exec 3<&0
set -m # a process group for the command and all that it starts
"$@" </dev/null 3<&- &
command=$!
{
  while read -r -t 15 -u 3 line; heard=$?; [ "$heard" = 0 ] && [ "$line" != END ]; do :; done
  kill -TERM -- "-$command"
  patience=$((heard == 1 ? 600 : 30)) # tenths of a second
  while kill -0 -- "-$command" && [ $((patience -= 1)) -gt 0 ]; do sleep 0.1; done
  kill -KILL -- "-$command"
} </dev/null >/dev/null 2>&1 &
watch=$!
disown "$watch" # bash tells the end of its jobs
wait "$command" 2>/dev/null
code=$?
# When a signal has ended a launcher, its processes save first.
for ((tenths = 0; tenths < 700; tenths++)); do kill -0 -- "-$command" 2>/dev/null || break; sleep 0.1; done
kill -KILL -- "-$command" 2>/dev/null
kill -- "-$watch" 2>/dev/null
exit "$code"
