// Standard output that is not there, or takes no more, is a failure and not a loss without a word.
#ifndef VATTN_BENCH_CLI_STANDARD_OUTPUT_H_
#define VATTN_BENCH_CLI_STANDARD_OUTPUT_H_

namespace vattn::bench {

// First thing in main: a closed standard stream's number would be given to the next file that is
// opened, and what is printed would go into that. Throws Failure without a standard output.
void RequireStandardOutput();
// Last thing in main: the exit code, which is 1 and not 0 if anything printed was lost.
int FinishStandardOutput(int exit_code);

}  // namespace vattn::bench

#endif  // VATTN_BENCH_CLI_STANDARD_OUTPUT_H_
