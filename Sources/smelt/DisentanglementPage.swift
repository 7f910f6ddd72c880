import Checkpoints
import Foundation
import Merging

/// The report of a disentanglement as a page with pictures, complete in one file.
struct DisentanglementPage {
  private let summary: DisentanglementSummary
  private var isByRow: Bool { summary.cleaning.method.scope == .row }

  init(_ summary: DisentanglementSummary) { self.summary = summary }

  func write(to path: String) throws {
    do { try Data(html.utf8).write(to: URL(filePath: path), options: .atomic) } catch {
      throw CheckpointError(file: path, "cannot be written: \(error.localizedDescription)")
    }
  }

  var html: String {
    let whole = summary.whole
    return """
      <!DOCTYPE html>
      <html lang="en">
      <meta charset="utf-8">
      <meta name="viewport" content="width=device-width, initial-scale=1">
      <title>Task vectors, disentangled</title>
      <style>
      \(style)
      </style>
      <main>
      <h1>Task vectors, disentangled</h1>
      <p>\(escaped(summary.experts.joined(separator: ", ")))<br>
      <code>\(escaped(summary.cleaning.description))</code></p>
      \(list(summary.warnings))
      <p>The mean |cos| between task vectors went from <b>\(decimal(whole.before.meanAbsoluteCosine))</b>
      to <b>\(decimal(whole.after.meanAbsoluteCosine))</b>; the redundant vector is
      <b>\(decimal(100 * whole.relativeRedundancy, 1)) %</b> as long as a task vector.</p>
      <h2>Cosines between task vectors, all that was cleaned together</h2>
      <div class="pair">
      \(figure("before", matrix(whole.before)))
      \(figure("after", matrix(whole.after)))
      </div>
      <p class="legend">Blue: the same way, orange: opposite ways; the deeper, the more so.</p>
      <h2>Norm that each task keeps, in %</h2>
      \(retainedNorms)
      <p class="legend">The deeper, the more was taken out; orange: less than 70 % is left, which is more than redundancy.</p>
      <h2>Mean |cos| between \(isByRow ? "rows" : "task vectors") of each layer, before (pale) and after</h2>
      \(bars)
      </main>
      </html>

      """
  }

  private func list(_ warnings: [String]) -> String {
    warnings.isEmpty
      ? "" : "<ul>" + warnings.map { "<li>\(escaped($0))</li>" }.joined(separator: "\n") + "</ul>"
  }

  private func figure(_ caption: String, _ picture: String) -> String {
    "<figure>\(picture)<figcaption>\(caption)</figcaption></figure>"
  }

  // MARK: Pictures

  /// Parts that have a row of their own: layers, or tensors where the model has no layers.
  private var parts: [DisentanglementSummary.Part] {
    let layers = summary.layers
    return layers.isEmpty ? summary.tensors : layers
  }

  /// A k × k picture: blue for the same way, orange for opposite ways.
  private func matrix(_ gram: GramMatrix) -> String {
    let names = summary.experts
    let rows = gram.cosineRows
    return Grid(rows: names, columns: names).svg { row, column in
      let cosine = rows[row][column]
      // The root shows small cosines, which are the usual ones.
      return (
        cosine >= 0 ? "same" : "opposite", min(1, abs(cosine)).squareRoot(), decimal(cosine, 2)
      )
    }
  }

  private var retainedNorms: String {
    let parts = parts
    return Grid(rows: parts.map { $0.name } + ["whole"], columns: summary.experts).svg {
      row, column in
      let report = row < parts.count ? parts[row].report : summary.whole
      let kept = report.retainedNorms[column]
      // What is lost is what should be seen.
      return (
        kept < DisentanglementReport.healthyNorm ? "opposite" : "same", min(1, abs(1 - kept) * 2),
        decimal(100 * kept, 1)
      )
    }
  }

  private var bars: String {
    let parts = parts
    let label = Grid.labelWidth(parts.map { $0.name })
    let cosines = parts.map { part in
      let report = part.report
      return isByRow
        ? (report.meanCosineBefore, report.meanCosineAfter)
        : (report.before.meanAbsoluteCosine, report.after.meanAbsoluteCosine)
    }
    let scale = 400 / max(1e-9, cosines.map { max($0.0, $0.1) }.max() ?? 1)
    var lines: [String] = []
    for (index, (part, cosines)) in zip(parts, cosines).enumerated() {
      let y = index * 22
      lines.append(
        """
        <text x="\(label - 8)" y="\(y + 15)" text-anchor="end">\(escaped(part.name))</text>\
        <rect x="\(label)" y="\(y + 2)" width="\(decimal(scale * cosines.0, 1))" height="18" class="same" fill-opacity="0.25"/>\
        <rect x="\(label)" y="\(y + 6)" width="\(decimal(scale * cosines.1, 1))" height="10" class="same"/>\
        <text x="\(label + 408)" y="\(y + 15)">\(decimal(cosines.0)) → \(decimal(cosines.1))</text>
        """)
    }
    let height = max(1, parts.count * 22)
    return """
      <svg viewBox="0 0 \(label + 530) \(height)" width="\(label + 530)" height="\(height)" role="img">
      <path class="axis" d="M\(label) 0 V\(height)"/>
      \(lines.joined(separator: "\n"))
      </svg>
      """
  }

  private var style: String { Self.style }

  /// The look of all reports.
  static var style: String {
    """
    :root { color-scheme: light dark; --page: #fff; --ink: #1b1f24; --pale: #59636e; --line: #d1d9e0; \
    --same: #1f6fd6; --opposite: #d9730d; --on: #fff; }
    @media (prefers-color-scheme: dark) { :root { --page: #14171c; --ink: #e6e9ed; --pale: #9aa4af; \
    --line: #3a424c; --same: #4d94f0; --opposite: #ef8f35; --on: #0b0d10; } }
    body { background: var(--page); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; margin: 2rem 1rem; }
    main { max-width: 60rem; margin: auto; overflow-x: auto; }
    h1 { font-size: 1.5rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
    code { color: var(--pale); font-size: 0.85rem; }
    ul { border-left: 3px solid var(--opposite); margin: 1rem 0; padding: 0.3rem 1rem 0.3rem 2rem; }
    .pair { display: flex; flex-wrap: wrap; gap: 1rem 3rem; } figure { margin: 0; }
    figcaption, .legend { color: var(--pale); } figcaption { text-align: center; } .legend { font-size: 0.85rem; }
    svg { display: block; max-width: none; font-size: 12px; } text { fill: var(--ink); }
    .same { fill: var(--same); } .opposite { fill: var(--opposite); } .on { fill: var(--on); }
    .frame { fill: none; stroke: var(--line); } .axis { stroke: var(--line); }
    """
  }
}

/// A picture of a table: every cell a square of colour with a number.
struct Grid {
  let rows: [String]
  let columns: [String]

  private let width = 64
  private let height = 30

  init(rows: [String], columns: [String]) {
    self.rows = rows
    self.columns = columns
  }

  static func labelWidth(_ labels: [String]) -> Int {
    16 + 7 * (labels.map { $0.count }.max() ?? 0)
  }

  /// - Parameter cell: the colour's class, its strength from 0 to 1, and the text of a cell.
  func svg(_ cell: (_ row: Int, _ column: Int) -> (String, Double, String)) -> String {
    let left = Grid.labelWidth(rows)
    // Column names stand slanted; the longest sets the height and what it sticks out to the right.
    let slant = Int(Double(Grid.labelWidth(columns)) * 0.72)
    let size = (left + columns.count * width + slant, slant + rows.count * height + 1)
    var parts: [String] = []
    for (column, name) in columns.enumerated() {
      let x = left + column * width + width / 2
      parts.append(
        "<text x=\"\(x)\" y=\"\(slant - 6)\" transform=\"rotate(-40 \(x) \(slant - 6))\">\(escaped(name))</text>"
      )
    }
    for (row, name) in rows.enumerated() {
      let y = slant + row * height
      parts.append(
        "<text x=\"\(left - 8)\" y=\"\(y + 19)\" text-anchor=\"end\">\(escaped(name))</text>")
      for column in columns.indices {
        let x = left + column * width
        let (colour, strength, text) = cell(row, column)
        parts.append(
          """
          <rect x="\(x)" y="\(y)" width="\(width)" height="\(height)" class="\(colour)" fill-opacity="\(decimal(strength, 3))"/>\
          <rect x="\(x)" y="\(y)" width="\(width)" height="\(height)" class="frame"/>\
          <text x="\(x + width / 2)" y="\(y + 19)" text-anchor="middle"\(strength > 0.6 ? " class=\"on\"" : "")>\(text)</text>
          """)
      }
    }
    return """
      <svg viewBox="0 0 \(size.0) \(size.1)" width="\(size.0)" height="\(size.1)" role="img">
      \(parts.joined(separator: "\n"))
      </svg>
      """
  }
}

/// Text as HTML shows it, whatever a stranger called a tensor.
func escaped(_ text: String) -> String {
  String(quoted(text).dropFirst().dropLast())
    .replacingOccurrences(of: "&", with: "&amp;").replacingOccurrences(of: "<", with: "&lt;")
    .replacingOccurrences(of: ">", with: "&gt;").replacingOccurrences(of: "\"", with: "&quot;")
}
