/* A Python interpreter that .ci/sanitize links with a sanitizer's runtime: preloaded it would be in every task of the tests, too. */
#include <Python.h>

int main(int argc, char **argv)
{
	return Py_BytesMain(argc, argv);
}
