# A shell with children and a pipe between them, slow until there is a file "go" here.
i=0
while [ $i -lt 1500 ]; do
	echo "$i"
	i=$((i + 1))
	[ -e go ] || sleep 0.02
done | while read -r line; do
	echo "$line has come"
done
echo end
