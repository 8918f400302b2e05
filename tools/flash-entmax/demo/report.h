// The demonstration's results on a terminal and as JSON.

#ifndef FLASH_ENTMAX_TOOLS_DEMO_REPORT_H_
#define FLASH_ENTMAX_TOOLS_DEMO_REPORT_H_

#include "demo/demo_result.h"
#include "output.h"

namespace flash_entmax::cli {

// To stdout, within 80 columns as far as names and numbers allow it.
void PrintReport(const DemoResult& result);

// Every figure, and the passages.
Json ReportToJson(const DemoResult& result);

}  // namespace flash_entmax::cli

#endif  // FLASH_ENTMAX_TOOLS_DEMO_REPORT_H_
