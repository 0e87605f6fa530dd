#!/bin/sh
# What `criu dump` calls at its stages (--action-script), for dumptool/criu.py. With status 0 from here, CRIU ends the
# dump as asked (kills the tree, or lets it go on); with another one, it undoes everything and the tree goes on.
#
# DUMPTOOL_RUN: directory of the run. DUMPTOOL_COMMIT: the file that says that the dump is complete.
case $CRTOOLS_SCRIPT_ACTION in
pre-dump | post-dump) ;;
*) exit 0 ;;
esac
echo "$CRTOOLS_SCRIPT_ACTION" 1<>"$DUMPTOOL_RUN/events" || exit 1
[ "$CRTOOLS_SCRIPT_ACTION" = post-dump ] || exit 0

# The tree stands still, until dumptool lets go of the lock. The kernel does that for it if it is killed.
flock "$DUMPTOOL_RUN/lock" true || exit 1
status=1
if [ -e "$DUMPTOOL_COMMIT" ]; then
    status=0
    if [ -s "$DUMPTOOL_RUN/kill" ]; then
        # Here and not by CRIU, which may have been killed: from the commit on, the tree must not run.
        kill -KILL $(cat "$DUMPTOOL_RUN/kill") 2>/dev/null
    fi
fi
[ -e "$DUMPTOOL_RUN/released" ] || rm -rf "$DUMPTOOL_RUN" # dumptool was killed
exit $status
