// The demonstration's results as one page that needs nothing else.

#ifndef FLASH_ENTMAX_TOOLS_DEMO_HTML_PAGE_H_
#define FLASH_ENTMAX_TOOLS_DEMO_HTML_PAGE_H_

#include <string>

#include "demo/demo_result.h"

namespace flash_entmax::cli {

std::string HtmlPage(const DemoResult& result);

}  // namespace flash_entmax::cli

#endif  // FLASH_ENTMAX_TOOLS_DEMO_HTML_PAGE_H_
