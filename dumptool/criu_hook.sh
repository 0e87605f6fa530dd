#!/bin/sh
# What `criu dump` calls at its stages (--action-script), for dumptool/criu.py. With status 0 from here, CRIU ends the
# dump as asked (kills the tree, or lets it go on); with another one, it undoes everything and the tree goes on.
#
# Pipes of dumptool: DUMPTOOL_EVENTS, which it reads, and DUMPTOOL_VERDICT, which it writes. DUMPTOOL_COMMIT: the file
# that says that the dump is complete, if there is one.
case $CRTOOLS_SCRIPT_ACTION in
pre-dump | post-dump) ;;
*) exit 0 ;;
esac
exec 3<"$DUMPTOOL_VERDICT" || exit 1 # before dumptool hears of us, because it closes its own end then
echo "$CRTOOLS_SCRIPT_ACTION" >"$DUMPTOOL_EVENTS" || exit 1
[ "$CRTOOLS_SCRIPT_ACTION" = post-dump ] || exit 0

# The tree stands still until dumptool closes the pipe. The kernel does that for it if it is killed.
victims='' finish=''
while read -r word rest; do
    case $word in
    kill) victims=$rest ;;
    finish) finish=yes ;;
    esac
done <&3
[ -n "$finish" ] || [ -e "$DUMPTOOL_COMMIT" ] || exit 1
if [ -n "$victims" ]; then
    # Here and not by CRIU, which may have been killed: from the commit on, the tree must not run.
    kill -KILL $victims 2>/dev/null
fi
exit 0
