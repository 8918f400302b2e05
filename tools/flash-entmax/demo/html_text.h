// Text for HTML and SVG.

#ifndef FLASH_ENTMAX_TOOLS_DEMO_HTML_TEXT_H_
#define FLASH_ENTMAX_TOOLS_DEMO_HTML_TEXT_H_

#include <string>
#include <string_view>

namespace flash_entmax::cli {

// Safe between tags and inside quoted attributes, whatever bytes it is given: the five special
// characters become entities, and what is not UTF-8, or is a control character, becomes U+FFFD.
std::string EscapeHtml(std::string_view text);

}  // namespace flash_entmax::cli

#endif  // FLASH_ENTMAX_TOOLS_DEMO_HTML_TEXT_H_
